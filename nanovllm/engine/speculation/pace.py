"""Pace: how many tokens to draft in the next step, down to none, so that speculation never makes an engine slower.

Owns what is measured for it: how long steps of so many tokens take, from one result to the next and so with everything
that belongs to them, and how many drafted tokens are accepted. There are two modes:

    off   plain decoding, steps overlap. Now and then a draft is made that no step verifies, and compared with what
          came: that tells what drafting would bring, and costs the device nothing.
    on    drafts in every step, as long as requests then get tokens faster than they did without.

Invariant: it decides about time alone. Whatever it says, tokens are the same.
"""

from collections.abc import Callable, Mapping, Sequence

from nanovllm.engine.request import Request

NUM_PLAIN = 3  # steps of each batch size that are measured before anything is drafted
GAIN = 1.03  # what drafting must promise, or bring
FIRST_PAUSE, LONGEST_PAUSE = 64, 4096  # steps
GAP = 8  # tokens between two comparisons of a request while drafting is off
WEIGHT = 0.1  # of the newest value in a running mean
HOPE = 1.3  # the most that drafting is given in advance: what it brings must soon be seen
ASSUMED_SLOWDOWN = 1.1  # of a step with drafts, where nothing is measured
PRIOR_TRIALS, MOST_TRIALS = 2.0, 24.0
FREE = 0.01  # what a token more adds to a step, as a share of it, until that is measured


class Duration:
    """The least time of late: a step may be held up by what is beside it, and is never faster than it can be."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_samples = 0

    def note(self, seconds: float) -> None:
        self.num_samples += 1
        if self.num_samples <= 2 or not self.seconds:  # the first may have captured a graph, or compiled a kernel
            self.seconds = seconds
        elif seconds < self.seconds:
            self.seconds += 0.3 * (seconds - self.seconds)
        else:
            self.seconds += min(0.02 * self.seconds, 0.05 * (seconds - self.seconds))


class Acceptance:
    """How often a drafted token was accepted after all before it were."""

    def __init__(self, prior: "Acceptance | None" = None) -> None:
        self._prior = prior
        self._hits = self._trials = 0.0

    @property
    def probability(self) -> float:
        prior = 0.5 if self._prior is None else self._prior.probability
        return (self._hits + PRIOR_TRIALS * prior) / (self._trials + PRIOR_TRIALS)

    def note(self, num_drafted: int, num_accepted: int) -> None:
        if not num_drafted:
            return
        trials = num_accepted + (num_accepted < num_drafted)
        kept = max(0.0, 1 - trials / MOST_TRIALS)
        self._hits, self._trials = kept * self._hits + num_accepted, kept * self._trials + trials
        if self._prior is not None:
            self._prior.note(num_drafted, num_accepted)

    def expected(self, num_drafted: int) -> float:
        """Tokens of a step: those accepted of so many, and the one behind them."""
        p = min(self.probability, 0.999)
        return (1 - p ** (num_drafted + 1)) / (1 - p)


class Pace:
    """most: tokens to draft for one request. clock: seconds; None measures nothing, and so plans alike on all ranks of
    a launcher. is_adaptive: off drafts as much as it may. can_compare: drafts cost next to nothing, so that they can be
    made for nothing; else drafting is tried again after pauses, each twice as long as the one before.
    """

    def __init__(
        self, most: int, clock: Callable[[], float] | None, is_adaptive: bool = True, can_compare: bool = True
    ) -> None:
        self.most = most
        self._can_compare = can_compare
        self._pause = FIRST_PAUSE
        self._num_steps_off = 0
        self.clock = clock
        self.is_adaptive = is_adaptive
        self.is_on = not is_adaptive
        self._last = 0.0  # when the last result came
        self._plain: dict[int, Duration] = {}  # by number of requests
        self._verify: dict[int, Duration] = {}  # by number of tokens, while drafting is on
        self._all = Acceptance()
        self._of_request: dict[Request, Acceptance] = {}
        self._guesses: dict[Request, tuple[int, list[int]]] = {}  # while it is off: behind how many tokens, and what
        self._promised = 0.0  # tokens beyond the first that a step would bring
        self._brought = 1.0  # speed, as a multiple of that without drafts
        self._slowdown = 1.0  # of a step with drafts
        self._caps = [0, *(n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if n < most), most]

    # -- what was measured --

    def note_step(self, num_reqs: int, num_tokens: int, num_emitted: int, is_decode: bool) -> None:
        """A result has come, of a step that was planned while drafting was as it is now."""
        if not self.is_adaptive:
            return
        slowdown = ASSUMED_SLOWDOWN
        if self.clock is not None:
            now = self.clock()
            seconds, self._last = now - self._last, now
            if not is_decode:
                return
            if not self.is_on:
                self._plain.setdefault(_bucket(num_reqs), Duration()).note(seconds)
                self._num_steps_off += 1
                return
            self._verify.setdefault(_bucket(num_tokens), Duration()).note(seconds)
            plain = self._plain_seconds(num_reqs)
            if plain is None:
                return
            slowdown = min(seconds / plain, 4.0)
        if not self.is_on:
            return
        self._slowdown += WEIGHT * (slowdown - self._slowdown)
        self._brought += WEIGHT * (num_emitted / num_reqs / slowdown - self._brought)
        if self._brought < GAIN - 0.02:
            self.is_on, self._promised = False, 0.0
            self._pause, self._num_steps_off = min(2 * self._pause, LONGEST_PAUSE), 0

    def _measured(self) -> list[int]:
        return [size for size, plain in self._plain.items() if plain.num_samples >= NUM_PLAIN]

    def _plain_seconds(self, num_reqs: int) -> float | None:
        """Of a step without drafts, by the measured one nearest in size."""
        nearest = min(self._measured(), key=lambda size: abs(size - num_reqs), default=None)
        return None if nearest is None else self._plain[nearest].seconds

    def note_draft(self, request: Request, num_drafted: int, num_accepted: int) -> None:
        self.acceptance(request).note(num_drafted, num_accepted)

    def acceptance(self, request: Request) -> Acceptance:
        found = self._of_request.get(request)
        if found is None:
            found = self._of_request[request] = Acceptance(self._all)
        return found

    def forget(self, request: Request) -> None:
        self._of_request.pop(request, None)
        self._guesses.pop(request, None)

    def clear(self) -> None:
        self._of_request.clear()
        self._guesses.clear()

    # -- while drafting is off --

    def compare(self, request: Request, propose: Callable[[Request, int], list[int]]) -> None:
        """What would a draft have brought the request, which has got a token?"""
        num_tokens = len(request.token_ids)
        begin, guess = self._guesses.get(request, (-1, []))
        if begin < 0:
            self._guesses[request] = num_tokens, propose(request, self.most)
        elif num_tokens >= begin + GAP:
            following = request.token_ids[begin : begin + len(guess)]
            num_accepted = num_equal(guess, following)
            self.note_draft(request, min(len(guess), len(following)), num_accepted)
            self._promised += WEIGHT * (num_accepted - self._promised)
            self._guesses[request] = num_tokens, propose(request, self.most)

    def decide(self, num_reqs: int) -> bool:
        """Is drafting on for the next step?"""
        if not self.is_on and self.is_adaptive:
            is_measured = self.clock is None or _bucket(num_reqs) in self._measured()
            is_due = 1 + self._promised > GAIN * max(1.02, self._slowdown)
            if not self._can_compare:
                is_due = self._pause == FIRST_PAUSE or self._num_steps_off >= self._pause
            if is_measured and is_due:
                self.is_on, self._brought = True, min(1 + self._promised, HOPE) if self._can_compare else HOPE
                self._guesses.clear()
        return self.is_on

    # -- while it is on --

    def shorten(self, drafts: Mapping[Request, Sequence[int]], num_reqs: int) -> int:
        """How many tokens of each draft a step should verify, of num_reqs requests in all."""
        if not self.is_adaptive or self.clock is None:
            return self.most
        best, best_speed = 0, 0.0
        for cap in self._caps:
            lengths = [min(cap, len(draft)) for draft in drafts.values()]
            emitted = num_reqs - len(lengths)
            expected = emitted + sum(
                self.acceptance(request).expected(length) for request, length in zip(drafts, lengths, strict=True)
            )
            speed = expected / self._seconds(num_reqs + sum(lengths))
            if speed > best_speed * (1.0 if cap == 0 else 1.005):
                best, best_speed = cap, speed
        return best

    def length(self, requests: Sequence[Request], num_reqs: int) -> int:
        """How many tokens to draft for each of these, before anything is drafted."""
        return self.shorten(dict.fromkeys(requests, range(self.most)), num_reqs)

    def _seconds(self, num_tokens: int) -> float:
        """Of a step with drafts; by the nearest measured one with fewer tokens where it is not measured."""
        bucket = _bucket(num_tokens)
        known = [size for size, duration in self._verify.items() if size <= bucket and duration.num_samples > 1]
        if not known:
            return 1 + FREE * num_tokens
        nearest = max(known)
        return self._verify[nearest].seconds * (1 + FREE * (bucket - nearest))


def num_equal(guess: Sequence[int], following: Sequence[int]) -> int:
    """How many tokens at their beginnings are equal."""
    pairs = zip(guess, following, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(guess), len(following)))


def _bucket(num_tokens: int) -> int:
    """Steps of nearly as many tokens take as long: the next of 1 to 8, then of 10, 12, 14, 16, 20, 24, ..."""
    step = 1
    while num_tokens > 8 * step:
        step *= 2
    return -(-num_tokens // step) * step
