"""What each identity was answered and refused: bounded, counted once, and the heavy ones by name."""

from collections import Counter

from tests.support.native.hand_turned import HandTurned, message, pairs_of

NAMED = 16


class Asking:
    """An engine, asked by many."""

    def __init__(self) -> None:
        self.turned = HandTurned()
        self.number = 0

    def ask(self, identity: str, tokens: int) -> None:
        """Have it answered."""
        self.number += 1
        self.turned.submit(message(self.number, tokens=tokens), identity=identity)
        self.turned.turn()
        batch = self.turned.fetch()
        batch.finish(pairs_of(batch), 0.0, 0.0, 0.0)
        self.turned.turn()

    def refuse(self, identity: str) -> None:
        self.turned.submit(message(layer=9), identity=identity)

    def tokens(self) -> dict[str, int]:
        return {identity: tokens for identity, tokens, _ in self.turned.tally.callers()}

    def refusals(self) -> dict[str, int]:
        return {identity: refusals for identity, _, refusals in self.turned.tally.callers()}

    def all(self) -> tuple[int, int]:
        """Tokens and refusals, whoever was answered or refused."""
        others = self.turned.tally.other_callers()
        return sum(self.tokens().values()) + others[0], sum(self.refusals().values()) + others[1]


def test_tokens_and_refusals_are_the_identities_whatever_their_connections() -> None:
    asking = Asking()
    for identity, tokens in (("a", 3), ("b", 5), ("a", 4)):
        asking.ask(identity, tokens)
    for identity in ("b", "c", "b"):
        asking.refuse(identity)
    assert asking.tokens() == {"a": 7, "b": 5, "c": 0}
    assert asking.refusals() == {"a": 0, "b": 2, "c": 1}
    assert asking.turned.tally.other_callers() == (0, 0)


def test_who_gives_up_is_not_refused() -> None:
    turned = HandTurned()
    submitted = turned.submit(message(), identity="a")
    turned.inbox.cancel(turned.engine, submitted.ticket or 0)
    turned.turn()
    assert (turned.tally.outcomes(1), turned.tally.callers()) == (1, [])


def test_any_number_of_callers_are_few_names_and_others() -> None:
    asking = Asking()
    for caller in range(300):
        asking.ask(f"caller {caller}", 1)
        asking.refuse(f"caller {caller}")
    assert len(asking.turned.tally.callers()) == NAMED
    assert asking.all() == (300, 300)


def test_a_heavy_caller_gets_a_name_among_any_number_of_light_ones() -> None:
    asking = Asking()
    for caller in range(100):
        asking.ask(f"light {caller}", 64)
    assert "heavy" not in asking.tokens()
    for caller in range(100):
        asking.ask("heavy", 64)
        asking.ask(f"lighter still {caller}", 1)
    # What it was answered before it had its name counts among the others.
    assert 64 * 90 < asking.tokens()["heavy"] < 64 * 100
    # And who lost its name took its count along.
    assert asking.all() == (64 * 199 + 100, 0)


def test_names_do_not_change_between_equals() -> None:
    asking = Asking()
    names = set[str]()
    for _ in range(20):
        for caller in range(40):
            asking.ask(f"caller {caller}", 64)
        names.update(asking.tokens())
    assert len(names) == NAMED


def test_no_count_falls_while_its_caller_keeps_its_name() -> None:
    asking, before = Asking(), Counter[str]()
    others = 0
    for turn in range(600):
        asking.ask(f"caller {turn * turn % 97}", turn % 7 * 40 + 1)
        now = asking.tokens()
        for name in before.keys() & now.keys():
            assert now[name] >= before[name]
        assert asking.turned.tally.other_callers()[0] >= others
        before, others = Counter(now), asking.turned.tally.other_callers()[0]
