-- KEYS: buckets. ARGV: for each bucket tokens per second, most tokens, tokens needed, tokens that it costs.
-- Returns 1 where every bucket has what is needed, else 0; then the tokens of each bucket after this. The costs are taken
-- from all buckets or from none, and may leave a debt. Time is Redis' own, so that clocks of replicas do not matter.
-- A full bucket is not kept: it expires when it would be full again.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local tokens, enough = {}, 1
for i, key in ipairs(KEYS) do
  local per_s, most, needed = tonumber(ARGV[4 * i - 3]), tonumber(ARGV[4 * i - 2]), tonumber(ARGV[4 * i - 1])
  local held = redis.call('HMGET', key, 'tokens', 'at')
  tokens[i] = most
  if held[1] then
    tokens[i] = math.min(most, held[1] + math.max(0, now - held[2]) / 1000000 * per_s)
  end
  if tokens[i] < needed then
    enough = 0
  end
end
for i, key in ipairs(KEYS) do
  local per_s, most, cost = tonumber(ARGV[4 * i - 3]), tonumber(ARGV[4 * i - 2]), tonumber(ARGV[4 * i])
  if enough == 1 and cost > 0 then
    tokens[i] = tokens[i] - cost
    local full_ms = math.min(1e14, math.ceil((most - tokens[i]) / per_s * 1000) + 1)
    redis.call('HSET', key, 'tokens', string.format('%.17g', tokens[i]), 'at', string.format('%.0f', now))
    redis.call('PEXPIRE', key, string.format('%.0f', full_ms))
  end
  tokens[i] = string.format('%.17g', tokens[i])
end
return {enough, unpack(tokens)}
