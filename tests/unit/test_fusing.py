"""Which requests run as one: a table of what has come together and of what was proven."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from denoised_server.worker.fusing import PATIENCE, PROOFS, REQUESTS_PER_PROOF, Fusing


def fusing(limit: int = 8, worth: Callable[[Hashable, Sequence[int]], int] = lambda key, rows: len(rows)) -> Fusing:
    return Fusing(limit, worth)


def sizes(policy: Fusing, kind: Hashable, count: int) -> list[int]:
    groups = policy.groups(kind, range(count))
    assert [each for group in groups for each in group] == list(range(count))
    return [len(group) for group in groups]


def test_nothing_is_fused_before_it_is_proven() -> None:
    policy = fusing()
    assert sizes(policy, "kind", 3) == [1, 1, 1]
    assert policy.wants_proof("kind", 3)
    assert sizes(policy, "kind", 3) == [1, 1, 1], "the proof is not in yet"
    policy.judge("kind", True)
    assert sizes(policy, "kind", 3) == [3]
    assert sizes(policy, "another", 3) == [1, 1, 1]
    assert not policy.wants_proof("kind", 3)


def test_what_came_out_otherwise_is_never_fused_nor_proven_again() -> None:
    policy = fusing()
    assert policy.wants_proof("kind", 2)
    policy.judge("kind", False)
    assert sizes(policy, "kind", 2) == [1, 1]
    assert not policy.wants_proof("kind", 2)


def test_a_proof_that_showed_nothing_may_be_had_again() -> None:
    policy = fusing()
    assert policy.wants_proof("kind", 2)
    policy.judge("kind", None)
    assert policy.wants_proof("kind", 2)


def test_what_runs_by_itself_is_never_proven() -> None:
    policy = fusing()
    assert not policy.wants_proof(None, 5)
    assert not policy.wants_proof("kind", 1), "nothing would be gained"
    assert sizes(policy, None, 5) == [1] * 5


def test_proofs_cost_a_busy_daemon_little() -> None:
    policy, proofs, requests = fusing(), 0, 0
    for kind in range(200):
        requests += 2
        policy.groups(kind, range(2))
        if policy.wants_proof(kind, 2):
            assert not policy.wants_proof("another", 2), "one at a time"
            policy.judge(kind, True)
            proofs += 1
    assert proofs <= PROOFS + requests / REQUESTS_PER_PROOF


def test_groups_are_as_large_as_the_limit_and_as_pays() -> None:
    policy = fusing(limit=4, worth=lambda key, rows: len(rows) if sum(rows) <= 6 else 3)
    policy.wants_proof("kind", 2)
    policy.judge("kind", True)
    assert sizes(policy, "kind", 9) == [4, 4, 1]
    policy.called("kind", "vae", 1, 0.1)
    policy.called("kind", "unet", 2, 0.2)
    policy.called("kind", None, 9, 9.0)
    assert sizes(policy, "kind", 9) == [3, 3, 3]


def test_a_group_that_fails_was_too_large() -> None:
    policy = fusing()
    policy.wants_proof("kind", 2)
    policy.judge("kind", True)
    assert sizes(policy, "kind", 8) == [8]
    policy.failed("kind", 8)
    assert sizes(policy, "kind", 8) == [4, 4]
    policy.failed("kind", 2)
    assert sizes(policy, "kind", 8) == [1] * 8


def test_a_few_that_are_back_wait_for_others_that_are_about_to_be() -> None:
    policy, long, soon, late = fusing(limit=8), 10.0, 0.5, 5.0
    policy.wants_proof("kind", 2)
    policy.judge("kind", True)
    assert not policy.gathers("kind", 2, 0.0, [soon], now=100.0), "nothing is known of how long a run takes"
    policy.ended("kind", long, now=100.0)
    assert policy.gathers("kind", 2, 0.0, [soon], now=101.0)
    assert policy.gathers("kind", 2, 0.0, [], now=100.01), "those of the run that has just ended"
    assert not policy.gathers("kind", 2, 0.0, [], now=101.0), "nobody is about to come"
    assert not policy.gathers("kind", 2, 0.0, [late], now=101.0), "it would be a wait"
    assert not policy.gathers("kind", 2, long * PATIENCE, [soon], now=101.0), "it has waited"
    assert not policy.gathers("kind", 8, 0.0, [soon], now=101.0), "they are as many as run as one"


def test_what_never_runs_as_one_waits_for_nobody() -> None:
    policy = fusing()
    policy.ended("kind", 10.0, now=100.0)
    assert not policy.gathers("kind", 2, 0.0, [0.5], now=101.0), "nothing is proven"
    policy.wants_proof("kind", 2)
    policy.judge("kind", False)
    assert not policy.gathers("kind", 2, 0.0, [0.5], now=101.0)
    assert not policy.gathers("unknown", 2, 0.0, [0.5], now=101.0)
