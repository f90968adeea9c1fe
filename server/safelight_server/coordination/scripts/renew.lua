-- KEYS: lease, token, result. ARGV: holder, lease ttl ms, memory ttl ms.
-- Returns 1 where the lease is the holder's: held, or run out while nobody else held it; else 0. No token at all means
-- that Redis has lost its memory, and with it whatever another could have decided: then 2.
local held = redis.call('GET', KEYS[1])
local newest = redis.call('GET', KEYS[2])
if held and held ~= ARGV[1] then
  return 0
end
if not held then
  if (newest and newest ~= ARGV[1]) or redis.call('EXISTS', KEYS[3]) == 1 then
    return 0
  end
end
if held and redis.call('PEXPIRE', KEYS[2], ARGV[3]) == 1 then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])  -- a Redis that is full takes no SET, and must not cost a lease
  return 1
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[3])
return newest and 1 or 2
