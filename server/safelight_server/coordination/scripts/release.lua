-- KEYS: lease, token. ARGV: holder. Returns 1 where the lease was the holder's.
-- The token is replaced by one that nobody has: no earlier holder, who may have slept meanwhile, renews or writes.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
if redis.call('GET', KEYS[2]) == ARGV[1] then
  redis.call('SET', KEYS[2], '-', 'KEEPTTL')
end
return redis.call('DEL', KEYS[1])
