"""The plan of what is computed once: every sequence in it, no scored position shared, and tokens saved."""

import random

import pytest

from pat.evaluation.tasks.prefixes import FAMILY_COST, Item, Plan, plan_prefixes, similar_batches


def check(items: list[Item], plan: Plan) -> None:
    """Assert what must hold for any plan."""
    assert sorted(index for family in plan.families for index in family.members) == list(range(len(items)))
    for family in plan.families:
        shared = items[family.members[0]].tokens[: family.length]
        assert plan.root <= family.length
        for index in family.members:
            assert items[index].tokens[: family.length] == shared
            assert family.length <= items[index].room
            assert plan.root == 0 or len(family.members) > 1 or family.length == plan.root
    assert plan.num_tokens(items) <= sum(len(item.tokens) for item in items)


def item(*tokens: int, scored: int = 1) -> Item:
    return Item(tokens, scored)


def test_the_choices_of_a_question_are_a_family_and_the_instruction_is_the_root() -> None:
    instruction, one, two = range(20), range(100, 130), range(200, 240)
    items = [item(*instruction, *question, 900 + choice, 7, scored=2) for question in (one, two) for choice in range(4)]
    plan = plan_prefixes(items)
    check(items, plan)
    assert plan.root == len(instruction)
    assert sorted(family.members for family in plan.families) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert sorted(family.length for family in plan.families) == [50, 60]
    assert plan.num_tokens(items) == 20 + 30 + 40 + 8 * 2


def test_a_stranger_leaves_what_the_others_share_alone() -> None:
    items = [item(*range(40), 50 + i) for i in range(4)] + [item(0, 1, 99, 98, 97), item(3)]
    plan = plan_prefixes(items)
    check(items, plan)
    assert plan.root == 0
    assert {family.members: family.length for family in plan.families if len(family.members) > 1} == {(0, 1, 2, 3): 40}


def test_scored_positions_are_never_shared() -> None:
    items = [item(*range(30), scored=12), item(*range(30), 31, scored=1)]
    plan = plan_prefixes(items)
    check(items, plan)
    assert max(plan.root, *(family.length for family in plan.families)) == 18


def test_sharing_too_little_is_no_family() -> None:
    items = [item(*range(FAMILY_COST), 100 + i, *range(50)) for i in range(2)]
    plan = plan_prefixes(items)
    assert plan.root == 0 and all(len(family.members) == 1 for family in plan.families)


@pytest.mark.parametrize("items", [[], [item(1, 2, 3)]])
def test_nothing_to_share(items: list[Item]) -> None:
    check(items, plan_prefixes(items))
    assert plan_prefixes(items).root == 0


def test_no_split_of_a_random_set_computes_fewer_tokens() -> None:
    """The search against every way to cut the sorted sequences into families."""
    random.seed(0)
    for _ in range(30):
        stems = [[random.randrange(2) for _ in range(3)] * 8 for _ in range(3)]
        items = list({tuple(random.choice(stems) + [random.randrange(3) for _ in range(4)]) for _ in range(7)})
        made = [Item(tokens, random.randint(1, 3)) for tokens in items]
        plan = plan_prefixes(made)
        check(made, plan)
        order = sorted(range(len(made)), key=lambda index: made[index].tokens)
        cost = plan.num_tokens(made) + FAMILY_COST * sum(len(family.members) > 1 for family in plan.families)
        assert cost == plan.root + min(_costs(made, order, plan.root))


def _costs(items: list[Item], order: list[int], root: int) -> list[int]:
    if not order:
        return [0]
    found = []
    for size in range(1, len(order) + 1):
        some = [items[index] for index in order[:size]]
        shared = root
        if size > 1:
            width = min(one.room for one in some)
            columns = zip(*(one.tokens[:width] for one in some), strict=True)
            same = [len(set(column)) == 1 for column in columns]
            shared = max(root, same.index(False) if False in same else len(same))
        own = shared - root + sum(len(one.tokens) - shared for one in some) + FAMILY_COST * (size > 1)
        found += [own + rest for rest in _costs(items, order[size:], root)]
    return found


def test_batches_hold_rows_of_similar_length() -> None:
    lengths = [3, 100, 90, 101, 99, 40, 5, 1, 99]
    batches = list(similar_batches(lengths, lambda length: length, 3))
    assert batches == [[101, 100, 99], [99, 90], [40], [5, 3, 1]]
    assert list(similar_batches([], len, 3)) == []
