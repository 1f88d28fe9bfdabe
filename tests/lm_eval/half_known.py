"""Makes a multiple-choice task of what a small model half knows: sums, series, opposites, capitals, spelling. Seeded."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

NAME = "half_known"
NUM_CHOICES = 3
NUM_SUMS = 61
NUM_SERIES = 60

OPPOSITES = (
    "hot cold,big small,up down,left right,day night,black white,fast slow,old young,rich poor,happy sad,early late,open closed,"
    "hard soft,high low,wet dry,full empty,strong weak,long short,light dark,good bad,love hate,war peace,first last,"
    "inside outside,true false,wide narrow,thick thin,heavy light,loud quiet,clean dirty,sharp dull,win lose,buy sell,push pull,"
    "begin end,north south,east west,ancient modern,brave cowardly,generous selfish,accept refuse,shallow deep,smooth rough,"
    "victory defeat"
)
CAPITALS = (
    "France Paris,Germany Berlin,Italy Rome,Spain Madrid,Japan Tokyo,China Beijing,Russia Moscow,Egypt Cairo,Greece Athens,"
    "Canada Ottawa,Australia Canberra,Portugal Lisbon,Austria Vienna,Sweden Stockholm,Norway Oslo,Finland Helsinki,Poland Warsaw,"
    "Hungary Budapest,Ireland Dublin,Turkey Ankara,Iran Tehran,Iraq Baghdad,Kenya Nairobi,Cuba Havana,Peru Lima,Chile Santiago,"
    "Belgium Brussels,Denmark Copenhagen,Thailand Bangkok,Vietnam Hanoi,Ukraine Kyiv,Romania Bucharest,Bulgaria Sofia,"
    "Serbia Belgrade,Morocco Rabat,Senegal Dakar,Nepal Kathmandu,Mongolia Ulaanbaatar,Uruguay Montevideo,Latvia Riga,"
    "Estonia Tallinn,Ghana Accra"
)
WORDS = (
    "house water bread stone river green seven horse cloud paper music table night dream light grass sugar snake tiger lemon "
    "bridge garden winter summer silver orange yellow people school window doctor market planet rocket forest castle"
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"

Item = dict[str, object]


def items(seed: int = 0) -> list[Item]:
    """The items, in an order of their own: question, choices, index of the right one."""
    draw = random.Random(seed)
    made = [
        *(_sum(draw) for _ in range(NUM_SUMS)),
        *(_series(draw) for _ in range(NUM_SERIES)),
        *_pairs(draw, OPPOSITES, "The opposite of {} is"),
        *_pairs(draw, CAPITALS, "The capital of {} is"),
        *(_spelling(draw, word) for word in WORDS.split()),
    ]
    draw.shuffle(made)
    return made


def write_task(folder: Path) -> int:
    """Write the task for lm-eval into `folder`, its data beside it; gives the number of items."""
    data = folder / f"{NAME}.jsonl"
    made = items()
    data.write_text("".join(json.dumps(item) + "\n" for item in made))
    task = {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return len(made)


def _item(draw: random.Random, question: str, right: str, wrong: list[str]) -> Item:
    others = [text for text in dict.fromkeys(wrong) if text != right]
    choices = [right, *draw.sample(others, NUM_CHOICES - 1)]
    draw.shuffle(choices)
    return {"question": question, "choices": choices, "answer": choices.index(right)}


def _sum(draw: random.Random) -> Item:
    a, b = draw.randint(2, 30), draw.randint(2, 30)
    sign = draw.choice("+-")
    first, right = (a, a + b) if sign == "+" else (a + b, a)
    near = [str(max(0, right + step)) for step in (-10, -2, -1, 1, 2, 10)]
    return _item(draw, f"Question: What is {first} {sign} {b}?\nAnswer:", str(right), near)


def _series(draw: random.Random) -> Item:
    kind = draw.randrange(3)
    if kind == 0:
        names = draw.choice((DAYS, MONTHS)).split()
        start = draw.randrange(len(names))
        told = [names[(start + step) % len(names)] for step in range(3)]
        return _item(draw, f"{', '.join(told)},", names[(start + 3) % len(names)], names)
    step, start = (draw.choice((2, 3, 4, 5, 10)) if kind == 1 else -draw.choice((1, 2, 3))), draw.randint(15, 60)
    told = [str(start + step * index) for index in range(4)]
    right = start + step * 4
    return _item(draw, f"{', '.join(told)},", str(right), [str(right + off) for off in (-2, -1, 1, 2, step)])


def _pairs(draw: random.Random, table: str, question: str) -> list[Item]:
    pairs = [pair.split() for pair in table.split(",")]
    seconds = [second for _, second in pairs]
    return [_item(draw, question.format(first), second, seconds) for first, second in pairs]


def _spelling(draw: random.Random, word: str) -> Item:
    swapped = []
    for index in range(len(word) - 1):
        letters = list(word)
        letters[index], letters[index + 1] = letters[index + 1], letters[index]
        swapped.append("-".join(letters))
    return _item(draw, f'The word "{word}" is spelled', "-".join(word), swapped)
