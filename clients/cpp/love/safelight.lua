--- Safelight client for LÖVE: images that show the previews of pictures while the game runs.
--
--   local safelight = require("safelight")
--   local client = safelight.connect("127.0.0.1:8421")
--   local potion = client:generate{prompt = "a red potion"}
--   function love.update() potion:update() end
--   function love.draw() if potion.image then love.graphics.draw(potion.image) end end
--
-- It calls libsafelight by LuaJIT's FFI. The loader must find it (LD_LIBRARY_PATH, or SAFELIGHT_LIBRARY with its path).
-- Only Generation:cancel waits for the server.
local ffi = require("ffi")

-- Copied from safelight.h; tests/engines/test_love.py compares them.
ffi.cdef [[
typedef struct safelight_error safelight_error;
typedef struct safelight_options safelight_options;
typedef struct safelight_client safelight_client;
typedef struct safelight_request safelight_request;
typedef struct safelight_generation safelight_generation;
uint32_t safelight_abi_version(void);
const char *safelight_error_message(const safelight_error *error);
const char *safelight_error_reason(const safelight_error *error);
void safelight_error_free(safelight_error *error);
safelight_options *safelight_options_new(void);
void safelight_options_set_api_key(safelight_options *options, const char *api_key);
void safelight_options_set_tls(safelight_options *options, const char *ca_pem, const char *server_name);
void safelight_options_free(safelight_options *options);
safelight_client *safelight_client_new(const char *target, const safelight_options *options, safelight_error **error);
void safelight_client_free(safelight_client *client);
void safelight_text_free(char *text);
safelight_request *safelight_request_new(const char *prompt);
void safelight_request_set_model(safelight_request *request, const char *model);
void safelight_request_set_negative_prompt(safelight_request *request, const char *prompt);
void safelight_request_set_size(safelight_request *request, int32_t width_px, int32_t height_px);
void safelight_request_set_num_inference_steps(safelight_request *request, int32_t steps);
void safelight_request_set_guidance_scale(safelight_request *request, double scale);
void safelight_request_add_output(safelight_request *request, uint64_t seed);
void safelight_request_free(safelight_request *request);
safelight_generation *safelight_generate(safelight_client *client, const safelight_request *request, double timeout_s, safelight_error **error);
int safelight_generation_state(const safelight_generation *generation);
int32_t safelight_generation_size(const safelight_generation *generation, int32_t *width_px, int32_t *height_px);
const safelight_error *safelight_generation_error(const safelight_generation *generation);
int32_t safelight_generation_step(const safelight_generation *generation, int32_t output_index, int32_t *num_steps);
char *safelight_generation_cancel(safelight_generation *generation, safelight_error **error);
void safelight_generation_free(safelight_generation *generation);
int32_t safelight_generation_poll_scaled_rgba8(safelight_generation *generation, int32_t output_index, void *pixels, size_t num_bytes, size_t row_pitch, int32_t flip, int32_t width_px, int32_t height_px, int32_t *step);
]]

local ABI_MAJOR, ACCEPTED, COPIED = 1, 1, 1
local lib = ffi.load(os.getenv("SAFELIGHT_LIBRARY") or "safelight")
assert(bit.rshift(lib.safelight_abi_version(), 16) == ABI_MAJOR, "this libsafelight is of another version")

local safelight = {}
local Client, Generation = {}, {}
Client.__index, Generation.__index = Client, Generation

--- Calls a function whose last argument is an error, and raises that error.
local function checked(call, ...)
  local failure = ffi.new("safelight_error *[1]")
  local arguments = {...}
  arguments[select("#", ...) + 1] = failure
  local result = call(unpack(arguments, 1, select("#", ...) + 1))
  if result ~= nil then return result end
  local message = ffi.string(lib.safelight_error_message(failure[0]))
  lib.safelight_error_free(failure[0])
  error(message, 3)
end

--- Makes a client of "host:port". Options: api_key, ca_pem, server_name.
function safelight.connect(target, options)
  options = options or {}
  local given = ffi.gc(lib.safelight_options_new(), lib.safelight_options_free)
  lib.safelight_options_set_api_key(given, options.api_key)
  if options.ca_pem then lib.safelight_options_set_tls(given, options.ca_pem, options.server_name) end
  local handle = checked(lib.safelight_client_new, target, given)
  return setmetatable({handle = ffi.gc(handle, lib.safelight_client_free)}, Client)
end

--- Starts a generation and returns at once. Fields: prompt; optional, with the model's defaults: negative_prompt, model,
-- width, height, steps, guidance_scale, seed (a whole number below 2^53); timeout_s is its deadline.
function Client:generate(fields)
  local request = ffi.gc(lib.safelight_request_new(fields.prompt), lib.safelight_request_free)
  lib.safelight_request_set_model(request, fields.model)
  lib.safelight_request_set_negative_prompt(request, fields.negative_prompt)
  if fields.width or fields.height then
    lib.safelight_request_set_size(request, fields.width or 0, fields.height or 0)
  end
  if fields.steps then lib.safelight_request_set_num_inference_steps(request, fields.steps) end
  if fields.guidance_scale then lib.safelight_request_set_guidance_scale(request, fields.guidance_scale) end
  if fields.seed then lib.safelight_request_add_output(request, fields.seed) end
  local handle = checked(lib.safelight_generate, self.handle, request, fields.timeout_s or 0)
  local generation = {handle = ffi.gc(handle, lib.safelight_generation_free), step = 0, num_steps = 0, ended = false}
  return setmetatable(generation, Generation)
end

--- Takes what has come; call it once a frame. Sets `image` (an Image of the picture's size, nil before the first preview),
-- `step`, `num_steps`, `ended`, and `failure` (a text) with `reason`. Returns whether the image has changed.
function Generation:update()
  if self.ended then return false end
  local state = lib.safelight_generation_state(self.handle)  -- before the poll, which then gives the picture
  local size, num_steps = ffi.new("int32_t[2]"), ffi.new("int32_t[1]")
  self.step = lib.safelight_generation_step(self.handle, 0, num_steps)
  self.num_steps = num_steps[0]
  local changed = false
  if lib.safelight_generation_size(self.handle, size, size + 1) == 1 then
    self.pixels = self.pixels or love.image.newImageData(size[0], size[1])
    local pixels = self.pixels
    changed = lib.safelight_generation_poll_scaled_rgba8(
      self.handle, 0, pixels:getFFIPointer(), pixels:getSize(), 0, 0, size[0], size[1], nil) == COPIED
    if changed and self.image then
      self.image:replacePixels(pixels)
    elseif changed then
      self.image = love.graphics.newImage(pixels)
    end
  end
  self.ended = state > ACCEPTED
  local failure = lib.safelight_generation_error(self.handle)
  if failure ~= nil then
    self.failure = ffi.string(lib.safelight_error_message(failure))
    self.reason = ffi.string(lib.safelight_error_reason(failure))
  end
  return changed
end

--- Asks the server to stop the generation, and waits for the answer.
function Generation:cancel()
  lib.safelight_text_free(checked(lib.safelight_generation_cancel, self.handle))
end

--- Stops watching: the server suspends the generation, and cancels it after its grace period. The garbage collector does so
-- too.
function Generation:close()
  lib.safelight_generation_free(ffi.gc(self.handle, nil))
  self.handle, self.ended = nil, true
end

return safelight
