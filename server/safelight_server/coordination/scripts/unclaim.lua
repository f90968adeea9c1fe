-- KEYS: claim. ARGV: value, ttl ms. Returns 1 where the claim was that value's.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
