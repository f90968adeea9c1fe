-- Shows eight generations side by side, each with its progress. Run: love clients/cpp/love [HOST:PORT]
local safelight = require("safelight")

local SPRITE, COLUMNS = 128, 4
local prompts = {
  "a red potion", "a blue potion", "a golden key on a blue background", "a green gem",
  "a silver coin", "a purple mushroom", "a wooden shield", "a yellow star",
}
local sprites, finished = {}, false

function love.load(arguments)
  local client = safelight.connect(arguments[1] or "127.0.0.1:8421")
  for index, prompt in ipairs(prompts) do
    sprites[index] = client:generate{prompt = prompt, seed = index - 1, width = SPRITE, height = SPRITE}
  end
end

function love.update()
  local num_ended = 0
  for _, sprite in ipairs(sprites) do
    if sprite.ended then num_ended = num_ended + 1 end  -- its picture was drawn in the frame before
    sprite:update()
  end
  if num_ended == #sprites and not finished then
    finished = true
    for index, sprite in ipairs(sprites) do
      if sprite.failure then io.stderr:write(prompts[index], ": ", sprite.failure, "\n") end
    end
    print(#sprites .. " sprites")
    io.stdout:flush()
  end
end

function love.draw()
  for index, sprite in ipairs(sprites) do
    local x, y = (index - 1) % COLUMNS * SPRITE, math.floor((index - 1) / COLUMNS) * SPRITE
    love.graphics.setColor(1, 1, 1)
    if sprite.image then love.graphics.draw(sprite.image, x, y) end
    if not sprite.ended and sprite.num_steps > 0 then
      love.graphics.rectangle("fill", x, y + SPRITE - 4, SPRITE * sprite.step / sprite.num_steps, 4)
    end
  end
end

function love.keypressed(key)
  if key == "escape" then love.event.quit() end
end
