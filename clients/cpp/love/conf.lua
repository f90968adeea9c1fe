function love.conf(t)
  t.version = "11.4"
  t.window.title = "Safelight"
  t.window.width, t.window.height = 512, 256
  t.window.x, t.window.y = 0, 0
  t.modules.audio, t.modules.sound, t.modules.joystick, t.modules.physics = false, false, false, false
end
