-- KEYS: claim. ARGV: value, ttl ms, the value it may replace. Returns the value that counts.
local there = redis.call('GET', KEYS[1])
if there and there ~= ARGV[3] then
  return there
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return ARGV[1]
