"""How much a key may have now: requests, tokens and answers at once.

In: a key and what it asks for. Out: `QuotaExceeded`, with the seconds after which it would be let
in, or nothing. Owns one `Account` per key's name, which outlives a change of the key file. The
clock is a parameter; knows no HTTP.

A rate is a bucket that holds a minute's worth and is refilled evenly. An answer's tokens are taken
as they come, so the bucket may fall below zero, and the next request waits until it is filled: no
request is refused for tokens that it might not use.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from tokenry.api.keys import Key
from tokenry.errors import TokenryError


class QuotaExceeded(TokenryError):
    """The key has had its share for now.

    retry_after_s   when it may come again; None: this request never fits, whenever it comes.
    """

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: float | None, mend: str) -> None:
        super().__init__(message, mend=mend)
        self.retry_after_s = retry_after_s


class Bucket:
    """Owned by Account. Holds `per_minute` at most and is refilled at that rate."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._seen_s = now_s

    def level(self, now_s: float) -> float:
        """What is in it; below zero is what is owed."""
        gained = (now_s - self._seen_s) * self.per_minute / 60
        self._level = min(float(self.per_minute), self._level + gained)
        self._seen_s = now_s
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` is in it, 0 if it is; inf if it never will be."""
        if amount > self.per_minute:
            return math.inf
        return max(0.0, amount - self.level(now_s)) * 60 / self.per_minute

    def take(self, amount: float, now_s: float) -> None:
        """Take it out, whether it is there or not."""
        self._level = self.level(now_s) - amount


class Account:
    """What one key has used. Owned by Limits."""

    def __init__(self, key: Key, clock: Callable[[], float]) -> None:
        self.key = key
        self.num_active = 0
        self._clock = clock
        self._requests = _bucket(None, key.requests_per_minute, clock())
        self._tokens = _bucket(None, key.tokens_per_minute, clock())

    def adopt(self, key: Key) -> None:
        """The key's limits were changed: what is used stays used where the limit is the same."""
        now_s = self._clock()
        self._requests = _bucket(self._requests, key.requests_per_minute, now_s)
        self._tokens = _bucket(self._tokens, key.tokens_per_minute, now_s)
        self.key = key

    def begin(self) -> None:
        """One more request; raises QuotaExceeded, and then nothing was taken. Ends with `end`."""
        key = self.key
        if key.max_concurrent is not None and self.num_active >= key.max_concurrent:
            raise QuotaExceeded(
                f"The key {key.name!r} has {self.num_active} requests under way, its limit is "
                f"{key.max_concurrent}.",
                retry_after_s=1.0,
                mend="send the request again when one of them has ended",
            )
        if self._tokens is not None:
            self._check("tokens", self._tokens, 1)
        if self._requests is not None:
            self._check("requests", self._requests, 1)
            self._requests.take(1, self._clock())
        self.num_active += 1

    def end(self) -> None:
        """A request that began has ended."""
        self.num_active -= 1

    def take_prompt(self, num_tokens: int) -> None:
        """A prompt's tokens; raises QuotaExceeded, and then nothing was taken."""
        if self._tokens is not None:
            self._check("tokens", self._tokens, num_tokens)
            self._tokens.take(num_tokens, self._clock())

    def give_back(self, num_tokens: int) -> None:
        """Tokens that were taken for nothing."""
        self.take_answer(-num_tokens)

    def take_answer(self, num_tokens: int) -> None:
        """Tokens of an answer, which is never cut short for them."""
        if self._tokens is not None:
            self._tokens.take(num_tokens, self._clock())

    def _check(self, what: str, bucket: Bucket, amount: int) -> None:
        wait_s = bucket.wait_s(amount, self._clock())
        if wait_s == math.inf:
            raise QuotaExceeded(
                f"The request needs {amount} {what}, the key {self.key.name!r} has "
                f"{bucket.per_minute} per minute.",
                retry_after_s=None,
                mend=f"a smaller request, or more {what}_per_minute for the key",
            )
        if wait_s > 0:
            raise QuotaExceeded(
                f"The key {self.key.name!r} has used its {bucket.per_minute} {what} per minute.",
                retry_after_s=wait_s,
                mend=f"send the request again in {math.ceil(wait_s)} s",
            )


class Limits:
    """The accounts of all keys."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    def account(self, key: Key) -> Account:
        """The key's account, with the limits that the key has now."""
        account = self._accounts.get(key.name)
        if account is None:
            account = self._accounts[key.name] = Account(key, self._clock)
        elif account.key != key:
            account.adopt(key)
        return account


def _bucket(old: Bucket | None, per_minute: int | None, now_s: float) -> Bucket | None:
    if per_minute is None:
        return None
    if old is not None and old.per_minute == per_minute:
        return old
    return Bucket(per_minute, now_s)
