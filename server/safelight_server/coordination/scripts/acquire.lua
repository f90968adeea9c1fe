-- KEYS: lease, token, result, fence. ARGV: owner, lease ttl ms, memory ttl ms.
-- Returns the token, or false where the lease is held by another or a result is committed.
if redis.call('EXISTS', KEYS[3]) == 1 then
  return false
end
local held = redis.call('GET', KEYS[1])
if held then
  local owner, token = string.match(held, '^(.*)|(%d+)$')
  if owner ~= ARGV[1] then
    return false
  end
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return tonumber(token)
end
local token = redis.call('INCR', KEYS[4])
local holder = ARGV[1] .. '|' .. string.format('%d', token)
redis.call('SET', KEYS[1], holder, 'NX', 'PX', ARGV[2])
redis.call('SET', KEYS[2], holder, 'PX', ARGV[3])
return token
