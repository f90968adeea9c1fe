-- KEYS: items, vector, of, buckets... ARGV: item, vector, now, ttl ms, most items, most members, prefix.
local item, ttl = ARGV[1], ARGV[4]
for _, bucket in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  redis.call('SREM', bucket, item)
end
redis.call('DEL', KEYS[3])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ttl)
for place = 4, #KEYS do
  if redis.call('SCARD', KEYS[place]) >= tonumber(ARGV[6]) then
    redis.call('SPOP', KEYS[place])
  end
  redis.call('SADD', KEYS[place], item)
  redis.call('PEXPIRE', KEYS[place], ttl)
  redis.call('SADD', KEYS[3], KEYS[place])
end
redis.call('PEXPIRE', KEYS[3], ttl)
redis.call('ZADD', KEYS[1], ARGV[3], item)
redis.call('PEXPIRE', KEYS[1], ttl)
local over = redis.call('ZCARD', KEYS[1]) - tonumber(ARGV[5])
if over > 0 then
  local gone = redis.call('ZPOPMIN', KEYS[1], over)
  for place = 1, #gone, 2 do
    local of = ARGV[7] .. 'of:' .. gone[place]
    for _, bucket in ipairs(redis.call('SMEMBERS', of)) do
      redis.call('SREM', bucket, gone[place])
    end
    redis.call('DEL', of, ARGV[7] .. 'vector:' .. gone[place])
  end
end
return 1
