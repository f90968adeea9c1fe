-- KEYS: items, vector, of, buckets... ARGV: item, vector, now, ttl ms, most items, most members, prefix, expired at.
-- Items whose vector has expired go as well: else they would stay in busy buckets, and crowd out those that can be found.
local item, ttl, prefix, PRUNED = ARGV[1], tonumber(ARGV[4]), ARGV[7], 64
local function take_out(gone)
  local of = prefix .. 'of:' .. gone
  for _, bucket in ipairs(redis.call('SMEMBERS', of)) do
    redis.call('SREM', bucket, gone)
  end
  redis.call('DEL', of, prefix .. 'vector:' .. gone)
  redis.call('ZREM', KEYS[1], gone)
end
take_out(item)
redis.call('ZADD', KEYS[1], ARGV[3], item)
redis.call('PEXPIRE', KEYS[1], ttl)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[8], 'LIMIT', 0, PRUNED)) do
  take_out(gone)
end
local over = redis.call('ZCARD', KEYS[1]) - tonumber(ARGV[5])
if over > 0 then
  for _, gone in ipairs(redis.call('ZRANGE', KEYS[1], 0, over - 1)) do
    take_out(gone)
  end
end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ttl)
for place = 4, #KEYS do -- last, so that what had to go has left its buckets before others must make room in them
  if redis.call('SCARD', KEYS[place]) >= tonumber(ARGV[6]) then
    redis.call('SPOP', KEYS[place])
  end
  redis.call('SADD', KEYS[place], item)
  redis.call('PEXPIRE', KEYS[place], ttl)
  redis.call('SADD', KEYS[3], KEYS[place])
end
redis.call('PEXPIRE', KEYS[3], 2 * ttl) -- until the item is taken out, for which its buckets must be known
return 1
