-- KEYS: token, result, lease, events, bills, billed. ARGV: owner, token, pointer, bill, memory ttl ms, most bills,
-- events ttl ms, billed ttl ms.
-- Returns 'committed', 'taken' or 'fenced'. Result and bill become visible together or not at all: Redis checks
-- its memory before the first write of a script, and no client sees the state between two of its commands. What is
-- committed anew after its result was forgotten, because the first answer was lost, is billed already.
local result = redis.call('HMGET', KEYS[2], 'owner', 'token')
if result[1] then
  if result[1] == ARGV[1] and result[2] == ARGV[2] then
    return 'committed'
  end
  return 'taken'
end
local holder = ARGV[1] .. '|' .. ARGV[2]
if redis.call('GET', KEYS[1]) ~= holder then
  return 'fenced'
end
redis.call('HSET', KEYS[2], 'pointer', ARGV[3], 'owner', ARGV[1], 'token', ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
if redis.call('SET', KEYS[6], '1', 'NX', 'PX', ARGV[8]) then
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[6], '*', 'd', ARGV[4])
end
redis.call('XADD', KEYS[4], '*', 'end', '1')
redis.call('PEXPIRE', KEYS[4], ARGV[7])
if redis.call('GET', KEYS[3]) == holder then
  redis.call('DEL', KEYS[3])
end
return 'committed'
