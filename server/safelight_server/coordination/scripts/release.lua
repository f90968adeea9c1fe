-- KEYS: lease, token. ARGV: holder. Returns 1 where the lease was the holder's.
-- The token is replaced by one that nobody has: no earlier holder, who may have slept meanwhile, renews or writes.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
if redis.call('GET', KEYS[2]) == ARGV[1] then
  local set = redis.pcall('SET', KEYS[2], '-', 'KEEPTTL')
  if set.err then  -- a full Redis takes no SET; without a token nobody writes either
    redis.call('DEL', KEYS[2])
  end
end
return redis.call('DEL', KEYS[1])
