-- KEYS: result, events, token. ARGV: owner, token of the result. Returns 1 where that result was the one there.
local result = redis.call('HMGET', KEYS[1], 'owner', 'token')
if result[1] ~= ARGV[1] or result[2] ~= ARGV[2] then
  return 0
end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
return 1
