-- KEYS: lease, token. ARGV: holder, lease ttl ms, memory ttl ms. Returns 1 where the lease is the holder's.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
