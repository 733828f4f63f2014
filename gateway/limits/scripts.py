"""What Redis runs, whole and undisturbed: every script looks at all counters of one tenant and changes all or none.

A tenant has two keys with one hash tag, so that a cluster keeps them together:

    tailor:{tenant}         hash: `requests` and `tokens` spent of the buckets at time `at`; `loads` spent of theirs at
                            `loads_at`; `month`, what of it is `used`, and when the database was asked (`seeded`);
                            `f:<gateway>`, its last forwarded count
    tailor:{tenant}:leases  sorted set: `<id>:<tokens>` of every running request, by the time until which its gateway
                            answers for it

`used` has in it what running requests have reserved. Times are Redis's own. A lease's removal is what makes a
settlement count once: sent again, it finds none. A lease that is not renewed stops counting as running; some minutes
later it is removed and its share of the month given back, for nobody has used it.
"""

from typing import Final

_COMMON: Final = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local counters, leases = KEYS[1], KEYS[2]
local function text(number) return string.format('%.17g', number) end

-- Months since year 0, UTC; days to date as in H. Hinnant, "chrono-compatible low-level date algorithms"
local function month_of(seconds)
  local day = math.floor(seconds / 86400) + 719468
  local era = math.floor(day / 146097)
  local of_era = day - era * 146097
  local year = math.floor(
    (of_era - math.floor(of_era / 1460) + math.floor(of_era / 36524) - math.floor(of_era / 146096)) / 365)
  local of_year = of_era - (365 * year + math.floor(year / 4) - math.floor(year / 100))
  local from_march = math.floor((5 * of_year + 2) / 153)
  local month = from_march < 10 and from_march + 3 or from_march - 9
  return (year + era * 400 + (month <= 2 and 1 or 0)) * 12 + month
end

local function reserved()
  local sum = 0
  for _, member in ipairs(redis.call('ZRANGE', leases, 0, -1)) do
    sum = sum + tonumber(string.match(member, '%d+$'))
  end
  return sum
end

-- What is used of this month: nothing but reservations where a new one has begun; nil where nobody has counted yet.
local function used_of(month, used)
  if not month or not used then return nil end
  if tonumber(month) ~= month_of(now) then return reserved() end
  return tonumber(used)
end
"""

# ARGV: member, tokens; limits: requests and tokens a minute, running, tokens a month ('' = none); lease_s,
# settle_within_s, kept_s. Returns {verdict, requests and tokens spent (in millionths), used of the month, now in µs}.
ADMIT: Final = (
    _COMMON
    + """
local asked = tonumber(ARGV[2])
local request_limit, token_limit = tonumber(ARGV[3]), tonumber(ARGV[4])
local running_limit, month_limit = tonumber(ARGV[5]), tonumber(ARGV[6])
local lease, within = tonumber(ARGV[7]), tonumber(ARGV[8])
local stored = redis.call('HMGET', counters, 'at', 'requests', 'tokens', 'month', 'used')
local gone = math.max(0, now - (tonumber(stored[1]) or now))
local requests = math.max(0, (tonumber(stored[2]) or 0) - gone * (request_limit or 0) / 60)
local tokens = math.max(0, (tonumber(stored[3]) or 0) - gone * (token_limit or 0) / 60)
local used = used_of(stored[4], stored[5])

local lost = redis.call('ZRANGEBYSCORE', leases, '-inf', now - within)
if #lost > 0 then
  redis.call('ZREMRANGEBYSCORE', leases, '-inf', now - within)
  for _, member in ipairs(lost) do
    if used then used = used - tonumber(string.match(member, '%d+$')) end
  end
end

local function answer(verdict)
  if used then redis.call('HSET', counters, 'month', month_of(now), 'used', text(used)) end
  return {verdict, math.floor(requests * 1000000 + 0.5), math.floor(tokens * 1000000 + 0.5), math.floor(used or 0),
          tonumber(time[1]) * 1000000 + tonumber(time[2])}
end

if month_limit and not used then return answer('unknown') end
if month_limit and used + asked > month_limit then return answer('month') end
if running_limit and redis.call('ZCOUNT', leases, now, '+inf') >= running_limit then return answer('running') end
if request_limit and requests + 1 > request_limit + 1e-6 then return answer('rate') end
if token_limit and tokens + asked > token_limit + 1e-6 then return answer('rate') end

requests = request_limit and requests + 1 or 0
tokens = token_limit and tokens + asked or 0
if used then used = used + asked end
redis.call('ZADD', leases, text(now + lease), ARGV[1])
redis.call('HSET', counters, 'at', text(now), 'requests', text(requests), 'tokens', text(tokens))
redis.call('EXPIRE', counters, ARGV[9])
redis.call('EXPIRE', leases, ARGV[9])
return answer('admitted')
"""
)

# ARGV: member, tokens used, tokens per minute ('' = no limit), requests to give back
SETTLE: Final = (
    _COMMON
    + """
if redis.call('ZREM', leases, ARGV[1]) == 0 then return 0 end
local asked = tonumber(string.match(ARGV[1], '%d+$'))
local spent = tonumber(ARGV[2])
local stored = redis.call('HMGET', counters, 'at', 'requests', 'tokens', 'month', 'used')
if not stored[1] then return 1 end
local token_limit = tonumber(ARGV[3])
if token_limit and spent ~= asked then
  local tokens = tonumber(stored[3])
  if spent > asked then  -- a bucket that has filled up since owes from now on, not from before
    tokens = math.max(tokens, (now - tonumber(stored[1])) * token_limit / 60)
  end
  redis.call('HSET', counters, 'tokens', text(tokens + spent - asked))
end
if ARGV[4] ~= '0' then redis.call('HSET', counters, 'requests', text(tonumber(stored[2]) - tonumber(ARGV[4]))) end
local used = used_of(stored[4], stored[5])
if used then
  if tonumber(stored[4]) == month_of(now) then used = used - asked end  -- else it is no longer among the reserved
  redis.call('HSET', counters, 'month', month_of(now), 'used', text(used + spent))
end
return 1
"""
)

# ARGV: tokens that the database knows of this month, kept_s. The first one counts.
SEED: Final = (
    _COMMON
    + """
local stored = redis.call('HMGET', counters, 'month', 'used')
if used_of(stored[1], stored[2]) then return 0 end
redis.call('HSET', counters, 'month', month_of(now), 'used', text(tonumber(ARGV[1]) + reserved()), 'seeded', text(now))
redis.call('EXPIRE', counters, ARGV[2])
return 1
"""
)

# ARGV: gateway, number of the message, tokens, time of the first of them. What a gateway has counted while it was
# alone; a database that was asked later knew of it already.
FORWARD: Final = (
    _COMMON
    + """
local field = 'f:' .. ARGV[1]
local stored = redis.call('HMGET', counters, 'month', 'used', 'seeded', field)
local used = used_of(stored[1], stored[2])
if not used or (tonumber(stored[4]) or 0) >= tonumber(ARGV[2]) then return 0 end
if (tonumber(stored[3]) or 0) <= tonumber(ARGV[4]) then used = used + tonumber(ARGV[3]) end
redis.call('HSET', counters, 'month', month_of(now), 'used', text(used), field, ARGV[2])
return 1
"""
)

# ARGV: lease_s (0: it runs no longer), kept_s, members. Only what is there is renewed.
RENEW: Final = (
    _COMMON
    + """
for index = 3, #ARGV do redis.call('ZADD', leases, 'XX', text(now + tonumber(ARGV[1])), ARGV[index]) end
redis.call('EXPIRE', leases, ARGV[2])
redis.call('EXPIRE', counters, ARGV[2])
return 1
"""
)

# ARGV: loads a minute, kept_s. Returns 0 where one more is allowed, and counted; else the microseconds until one is.
LOAD: Final = (
    _COMMON
    + """
local limit = tonumber(ARGV[1])
local stored = redis.call('HMGET', counters, 'loads', 'loads_at')
local gone = math.max(0, now - (tonumber(stored[2]) or now))
local spent = math.max(0, (tonumber(stored[1]) or 0) - gone * limit / 60)
local over = spent + 1 - limit
if over > 1e-6 then return math.ceil(limit > 0 and over * 60000000 / limit or 60000000) end
redis.call('HSET', counters, 'loads', text(spent + 1), 'loads_at', text(now))
redis.call('EXPIRE', counters, ARGV[2])
return 0
"""
)

ALL: Final = (ADMIT, SETTLE, SEED, FORWARD, RENEW, LOAD)

MONTH: Final = _COMMON + "return month_of(tonumber(ARGV[1]))"
"""For tests: the month of a time."""
