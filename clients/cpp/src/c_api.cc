#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>

#include "c_handles.h"

using safelight::guarded;
namespace v1 = safelight::v1;

namespace {

constexpr char kRaw[] = "application/x-raw-rgba8";
constexpr double kLongestS = 1e8;  // three years: longer times overflow the clock

std::string text(const char* given) { return given ? given : ""; }

/// A positive number of seconds.
std::chrono::nanoseconds seconds(double s) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(std::min(s, kLongestS)));
}

std::optional<std::chrono::nanoseconds> timeout(double s) {
  return s > 0 ? std::optional(seconds(s)) : std::nullopt;
}

template <typename Handle>
Handle& required(Handle* handle, const char* what) {
  if (!handle) throw std::invalid_argument(std::string(what) + " is NULL");
  return *handle;
}

/// For setters: if there is no memory, the value stays as it is.
template <typename Work>
void quietly(Work work) noexcept {
  guarded(nullptr, 0, [&work] {
    work();
    return 0;
  });
}

v1::GenerationSpec& spec_of(safelight_request* request) { return *request->message.mutable_spec(); }

}  // namespace

namespace safelight {

safelight_error* make_error(const Error& failure) {
  auto error = std::make_unique<safelight_error>();
  error->code = failure.code();
  error->reason = failure.reason();
  error->message = failure.what();
  if (failure.retry_after()) error->retry_after_s = std::chrono::duration<double>(*failure.retry_after()).count();
  error->violations.assign(failure.violations().begin(), failure.violations().end());
  return error.release();
}

void tell(safelight_error** error) noexcept {
  if (!error) return;
  try {
    try {
      throw;
    } catch (const Error& failure) {
      *error = make_error(failure);
    } catch (const std::invalid_argument& failure) {
      *error = make_error(Error({grpc::INVALID_ARGUMENT, failure.what()}));
    } catch (const std::exception& failure) {
      *error = make_error(Error({grpc::INTERNAL, failure.what()}));
    } catch (...) {
      *error = make_error(Error({grpc::INTERNAL, "not an exception of the standard library"}));
    }
  } catch (...) {
    *error = nullptr;  // no memory for the error either
  }
}

std::string to_json(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.always_print_primitive_fields = true;  // so that readers need not know the default values
  std::string json;
  const auto status = google::protobuf::util::MessageToJsonString(message, &json, options);
  if (!status.ok()) throw std::runtime_error(status.ToString());
  return json;
}

char* copied(const std::string& text) {
  char* copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (!copy) throw std::bad_alloc();
  std::memcpy(copy, text.c_str(), text.size() + 1);
  return copy;
}

}  // namespace safelight

extern "C" {

uint32_t safelight_abi_version(void) { return SAFELIGHT_ABI_VERSION; }

// Errors.

int32_t safelight_error_code(const safelight_error* error) { return error->code; }
const char* safelight_error_code_name(const safelight_error* error) {
  return safelight::code_name(static_cast<grpc::StatusCode>(error->code));
}
const char* safelight_error_reason(const safelight_error* error) { return error->reason.c_str(); }
const char* safelight_error_message(const safelight_error* error) { return error->message.c_str(); }
double safelight_error_retry_after_s(const safelight_error* error) { return error->retry_after_s; }
int32_t safelight_error_num_violations(const safelight_error* error) {
  return static_cast<int32_t>(error->violations.size());
}
const char* safelight_error_violation_field(const safelight_error* error, int32_t index) {
  return index < 0 || index >= safelight_error_num_violations(error) ? "" : error->violations[index].first.c_str();
}
const char* safelight_error_violation_description(const safelight_error* error, int32_t index) {
  return index < 0 || index >= safelight_error_num_violations(error) ? "" : error->violations[index].second.c_str();
}
void safelight_error_free(safelight_error* error) { delete error; }

// Options.

safelight_options* safelight_options_new(void) { return new (std::nothrow) safelight_options(); }
void safelight_options_set_api_key(safelight_options* options, const char* api_key) {
  quietly([&] { options->api_key = text(api_key); });
}
void safelight_options_set_tls(safelight_options* options, const char* ca_pem, const char* server_name) {
  quietly([&] {
    options->tls = true;
    options->pem.pem_root_certs = text(ca_pem);
    options->server_name = text(server_name);
  });
}
void safelight_options_set_certificate(safelight_options* options, const char* certificate_pem, const char* key_pem) {
  quietly([&] {
    options->pem.pem_cert_chain = text(certificate_pem);
    options->pem.pem_private_key = text(key_pem);
  });
}
void safelight_options_set_patience_s(safelight_options* options, double patience_s) {
  options->patience_s = patience_s;
}
void safelight_options_set_retries(safelight_options* options, int32_t retries) { options->retries = retries; }
void safelight_options_set_max_message_bytes(safelight_options* options, int32_t num_bytes) {
  options->max_message_bytes = num_bytes;
}
void safelight_options_free(safelight_options* options) { delete options; }

// Client.

safelight_client* safelight_client_new(const char* target, const safelight_options* options, safelight_error** error) {
  return guarded(error, static_cast<safelight_client*>(nullptr), [&] {
    safelight::ClientOptions given;
    if (options) {
      given.api_key = options->api_key;
      if (!(options->patience_s >= 0)) throw std::invalid_argument("patience_s must be 0 or more");
      given.patience = std::chrono::duration_cast<std::chrono::milliseconds>(seconds(options->patience_s));
      given.retries = options->retries;
      if (options->max_message_bytes < 1) throw std::invalid_argument("max_message_bytes must be 1 or more");
      given.max_message_bytes = options->max_message_bytes;
      if (options->tls) given.credentials = grpc::SslCredentials(options->pem);
      given.server_name = options->server_name;
    }
    return new safelight_client{std::make_shared<safelight::Client>(text(target), std::move(given))};
  });
}

void safelight_client_free(safelight_client* client) { delete client; }

char* safelight_client_models(safelight_client* client, safelight_error** error) {
  return guarded(error, static_cast<char*>(nullptr), [&] {
    v1::ListModelsResponse all;
    for (auto& model : required(client, "client").client->models()) *all.add_models() = std::move(model);
    return safelight::copied(safelight::to_json(all));
  });
}

char* safelight_client_get(safelight_client* client, const char* generation, safelight_error** error) {
  return guarded(error, static_cast<char*>(nullptr), [&] {
    return safelight::copied(safelight::to_json(required(client, "client").client->get(text(generation))));
  });
}

char* safelight_client_upload_image(safelight_client* client, const uint8_t* data, size_t num_bytes,
                                    safelight_error** error) {
  return guarded(error, static_cast<char*>(nullptr), [&] {
    const std::string file(reinterpret_cast<const char*>(&required(data, "data")), num_bytes);
    return safelight::copied(required(client, "client").client->upload_image(file).name());
  });
}

char* safelight_client_cancel(safelight_client* client, const char* generation, safelight_error** error) {
  return guarded(error, static_cast<char*>(nullptr), [&] {
    return safelight::copied(safelight::to_json(required(client, "client").client->cancel(text(generation))));
  });
}

void safelight_text_free(char* text) { std::free(text); }

// Request.

safelight_request* safelight_request_new(const char* prompt) {
  return guarded(nullptr, static_cast<safelight_request*>(nullptr), [&] {
    auto request = std::make_unique<safelight_request>();
    request->message.mutable_spec()->set_prompt(text(prompt));
    request->message.mutable_preview()->add_accept()->set_media_type(kRaw);
    request->message.mutable_encoding()->set_media_type(kRaw);
    return request.release();
  });
}

safelight_request* safelight_request_from_json(const char* json, safelight_error** error) {
  return guarded(error, static_cast<safelight_request*>(nullptr), [&] {
    auto request = std::make_unique<safelight_request>();
    const auto status = google::protobuf::util::JsonStringToMessage(text(json), &request->message);
    if (!status.ok()) throw std::invalid_argument("not a GenerateRequest: " + std::string(status.message()));
    return request.release();
  });
}

void safelight_request_set_model(safelight_request* request, const char* model) {
  quietly([&] { spec_of(request).set_model(text(model)); });
}
void safelight_request_set_negative_prompt(safelight_request* request, const char* prompt) {
  quietly([&] {
    auto& prompts = *spec_of(request).mutable_prompts();
    prompts.Clear();  // the positive one is in `prompt`
    if (text(prompt).empty()) return;
    auto* negative = prompts.Add();
    negative->set_role(v1::Prompt::ROLE_NEGATIVE);
    negative->set_text(text(prompt));
  });
}
void safelight_request_set_size(safelight_request* request, int32_t width_px, int32_t height_px) {
  quietly([&] {
    spec_of(request).set_width_px(width_px);
    spec_of(request).set_height_px(height_px);
  });
}
void safelight_request_set_num_inference_steps(safelight_request* request, int32_t steps) {
  quietly([&] { spec_of(request).set_num_inference_steps(steps); });
}
void safelight_request_set_guidance_scale(safelight_request* request, double scale) {
  quietly([&] { spec_of(request).set_guidance_scale(static_cast<float>(scale)); });
}
void safelight_request_set_init_image(safelight_request* request, const char* image) {
  quietly([&] { spec_of(request).set_init_image(text(image)); });
}
void safelight_request_set_strength(safelight_request* request, double strength) {
  quietly([&] { spec_of(request).set_strength(static_cast<float>(strength)); });
}
void safelight_request_set_mask(safelight_request* request, const char* image) {
  quietly([&] { spec_of(request).set_mask(text(image)); });
}
void safelight_request_set_guidance_interval(safelight_request* request, double start, double end) {
  quietly([&] {
    auto& interval = *spec_of(request).mutable_guidance_interval();
    interval.set_start(static_cast<float>(start));
    interval.set_end(static_cast<float>(end));
  });
}
void safelight_request_set_guidance_rescale(safelight_request* request, double rescale) {
  quietly([&] { spec_of(request).set_guidance_rescale(static_cast<float>(rescale)); });
}
void safelight_request_set_quality_floor(safelight_request* request, int32_t min_num_steps, int32_t cheaper_previews,
                                         double min_similarity) {
  quietly([&] {
    auto& floor = *request->message.mutable_quality_floor();
    floor.Clear();
    if (min_num_steps != 0) floor.set_min_num_steps(min_num_steps);
    floor.set_cheaper_previews(cheaper_previews != 0);
    if (min_similarity != 0) floor.set_min_similarity(static_cast<float>(min_similarity));
  });
}
void safelight_request_add_output(safelight_request* request, uint64_t seed) {
  quietly([&] { spec_of(request).add_outputs()->set_seed(seed); });
}
void safelight_request_set_preview_max_edge(safelight_request* request, int32_t max_edge_px) {
  quietly([&] { request->message.mutable_preview()->set_max_edge_px(max_edge_px); });
}
void safelight_request_set_preview_every_n_steps(safelight_request* request, int32_t n) {
  quietly([&] { request->message.mutable_preview()->set_every_n_steps(n); });
}
void safelight_request_set_picture_media_type(safelight_request* request, const char* media_type) {
  quietly([&] { request->message.mutable_encoding()->set_media_type(text(media_type)); });
}
void safelight_request_free(safelight_request* request) { delete request; }

// Generation.

safelight_generation* safelight_generate(safelight_client* client, const safelight_request* request, double timeout_s,
                                         safelight_error** error) {
  return guarded(error, static_cast<safelight_generation*>(nullptr), [&] {
    const auto& asked = required(client, "client").client;
    return new safelight_generation(asked,
                                    asked->generate(required(request, "request").message, timeout(timeout_s)));
  });
}

safelight_generation* safelight_watch(safelight_client* client, const char* generation,
                                      const safelight_request* request, double timeout_s, safelight_error** error) {
  return guarded(error, static_cast<safelight_generation*>(nullptr), [&] {
    const auto& asked = required(client, "client").client;
    if (text(generation).empty()) throw std::invalid_argument("generation names none");
    std::optional<v1::PreviewPolicy> preview(std::in_place);
    if (!request) {
      preview->set_method(v1::PREVIEW_METHOD_NONE);
    } else if (request->message.has_preview()) {
      *preview = request->message.preview();
    } else {
      preview.reset();
    }
    return new safelight_generation(asked, asked->watch(generation, std::move(preview), timeout(timeout_s)));
  });
}

safelight_state safelight_generation_state(const safelight_generation* generation) {
  std::lock_guard lock(generation->mutex);
  return generation->state;
}

safelight_state safelight_generation_wait(safelight_generation* generation, double timeout_s) {
  return generation->wait(timeout_s);
}

const char* safelight_generation_name(const safelight_generation* generation) {
  std::lock_guard lock(generation->mutex);
  return generation->name.empty() ? "" : generation->name.c_str();  // the address of an empty name would become invalid
}

int32_t safelight_generation_size(const safelight_generation* generation, int32_t* width_px, int32_t* height_px) {
  std::lock_guard lock(generation->mutex);
  if (width_px) *width_px = generation->width_px;
  if (height_px) *height_px = generation->height_px;
  return generation->width_px > 0;
}

const safelight_error* safelight_generation_error(const safelight_generation* generation) {
  std::lock_guard lock(generation->mutex);
  return generation->error.get();
}

int32_t safelight_generation_step(const safelight_generation* generation, int32_t output_index, int32_t* num_steps) {
  const auto output = generation->output(output_index);
  if (num_steps) *num_steps = output.num_steps;
  return output.step;
}

char* safelight_generation_cancel(safelight_generation* generation, safelight_error** error) {
  return guarded(error, static_cast<char*>(nullptr), [&] {
    const std::string name = safelight_generation_name(&required(generation, "generation"));
    if (name.empty()) throw safelight::Error({grpc::FAILED_PRECONDITION, "the server has not accepted it yet"});
    return safelight::copied(safelight::to_json(generation->client->cancel(name)));
  });
}

void safelight_generation_close(safelight_generation* generation) { generation->close(); }
void safelight_generation_free(safelight_generation* generation) { delete generation; }

int32_t safelight_generation_poll_rgba8(safelight_generation* generation, int32_t output_index, void* pixels,
                                        size_t num_bytes, size_t row_pitch, int32_t flip, int32_t* width_px,
                                        int32_t* height_px, int32_t* step) {
  return generation->poll_rgba8(output_index, {pixels, num_bytes, row_pitch, flip != 0}, width_px, height_px, step);
}

int32_t safelight_generation_poll_scaled_rgba8(safelight_generation* generation, int32_t output_index, void* pixels,
                                               size_t num_bytes, size_t row_pitch, int32_t flip, int32_t width_px,
                                               int32_t height_px, int32_t* step) {
  const safelight::Target target{pixels, num_bytes, row_pitch, flip != 0, width_px, height_px};
  return generation->poll_rgba8(output_index, target, nullptr, nullptr, step);
}

// Images.

const safelight_image* safelight_generation_picture(const safelight_generation* generation, int32_t output_index) {
  return generation->output(output_index).picture.get();  // the generation keeps it alive
}
const char* safelight_image_media_type(const safelight_image* image) { return image->image.media_type.c_str(); }
int32_t safelight_image_width_px(const safelight_image* image) { return image->image.width_px; }
int32_t safelight_image_height_px(const safelight_image* image) { return image->image.height_px; }
int32_t safelight_image_stride_bytes(const safelight_image* image) { return image->image.stride_bytes; }
int32_t safelight_image_bottom_up(const safelight_image* image) { return image->image.bottom_up; }
const uint8_t* safelight_image_data(const safelight_image* image, size_t* num_bytes) {
  if (num_bytes) *num_bytes = image->image.data.size();
  return reinterpret_cast<const uint8_t*>(image->image.data.data());
}
uint64_t safelight_image_seed(const safelight_image* image) { return image->seed; }
int32_t safelight_image_copy_rgba8(const safelight_image* image, void* pixels, size_t num_bytes, size_t row_pitch,
                                   int32_t flip) {
  return safelight::copy_rgba8(image->image, {pixels, num_bytes, row_pitch, flip != 0});
}
int32_t safelight_image_scale_rgba8(const safelight_image* image, void* pixels, size_t num_bytes, size_t row_pitch,
                                    int32_t flip, int32_t width_px, int32_t height_px) {
  return safelight::copy_rgba8(image->image, {pixels, num_bytes, row_pitch, flip != 0, width_px, height_px});
}

// Events.

safelight_event* safelight_generation_next(safelight_generation* generation, double timeout_s) {
  return generation->next(timeout_s).release();
}
safelight_event_kind safelight_event_get_kind(const safelight_event* event) { return event->kind; }
int32_t safelight_event_output_index(const safelight_event* event) { return event->output_index; }
int32_t safelight_event_step(const safelight_event* event) { return event->step; }
int32_t safelight_event_num_steps(const safelight_event* event) { return event->num_steps; }
int32_t safelight_event_num_dropped(const safelight_event* event) { return event->num_dropped; }
const safelight_image* safelight_event_image(const safelight_event* event) { return event->image.get(); }
const char* safelight_event_json(const safelight_event* event) { return event->json.c_str(); }
void safelight_event_free(safelight_event* event) { delete event; }

}  // extern "C"
