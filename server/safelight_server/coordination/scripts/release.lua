-- KEYS: lease. ARGV: holder. Returns 1 where the lease was the holder's.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
return redis.call('DEL', KEYS[1])
