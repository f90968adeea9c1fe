-- KEYS: token, events. ARGV: holder, data, most events, memory ttl ms. Returns the place, or false for a fenced holder.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return false
end
local place = redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', 'd', ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return place
