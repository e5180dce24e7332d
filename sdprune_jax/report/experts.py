"""The part of a report on experts: who draws what, what each keeps, balance and budget."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sdprune_jax.report import charts
from sdprune_jax.report.charts import text
from sdprune_jax.report.files import Files, picture

_NUM_PICTURES = 4  # on a card
_NUM_PROMPTS = 3  # on a card
_SPLITS = {"train": "to learn from", "val": "unseen", "test": "unseen, test"}
_INFORMATION = {
    "information_style": "Information on the style",
    "information_style_shuffled": "The same by chance",
    "information_group": "Information on the subject",
    "information_group_shuffled": "The same by chance",
}
_SITES = {
    "attn1": "self-attention",
    "attn2": "cross-attention",
    "ff": "feed-forward",
    "resnets": "ResNet",
}


def verdict(files: Files) -> list[str]:
    """How many experts there are and what they keep, in sentences of HTML."""
    rows = files.experts.get("experts", [])
    if not rows:
        return []
    if len(rows) == 1:
        return [
            f"One smaller UNet for all prompts keeps <b>{rows[0]['share_of_macs']:.1%}</b> of the"
            f" UNet's MACs and {rows[0]['share_of_parameters']:.1%} of its parameters."
        ]
    shares = [row["share_of_macs"] for row in rows]
    sentence = (
        f"Every prompt is drawn by one of <b>{len(rows)} experts</b>, smaller UNets that keep"
        f" {min(shares):.1%} to {max(shares):.1%} of the UNet's MACs."
    )
    if files.assigned:
        budget, splits = files.assigned["macs_budget"], files.assigned["splits"]
        unseen = splits.get("val") or next(iter(splits.values()))
        sentence += (
            f" The average unseen prompt keeps <b>{unseen['macs']:.1%}</b> ({budget:.1%} asked)"
        )
        dead = len(unseen["dead"])
        sentence += f"; {dead} of the experts get none of these prompts." if dead else "."
    return [sentence]


def overview(files: Files) -> str:
    """All of it: a card an expert, their architectures, and how evenly prompts are shared."""
    rows = files.experts.get("experts", [])
    if not rows:
        return ""
    size = " x ".join(map(str, files.experts["latent_size"]))
    notes = (
        "Share of prompts: of those that the experts learn from. MACs: of one call of the UNet at a"
        f" latent of {size}, beside the dense UNet's {_count(files.experts['dense']['macs'])}, as"
        f" the counter {files.experts['mac_counter']!r} has it."
    )
    if "expert" in files.images.get("models", {}).get("routed", {}):
        notes += " Pictures: the first that each expert drew."
    return charts.section(
        "Experts" if len(rows) > 1 else "The smaller UNet",
        f'<p class="note">{text(notes)}</p>',
        '<div class="cards">',
        *(_card(files, index) for index in range(len(rows))),
        "</div>",
        _heat(files.experts),
        _numbers(files),
        _balance(files.assigned) if files.assigned else "",
    )


def _card(files: Files, index: int) -> str:
    row = files.experts["experts"][index]
    total = sum(other["prompts"].get("train", 0) for other in files.experts["experts"])
    facts = {
        "prompts": row["prompts"].get("train", 0) / total if total else 0.0,
        "MACs": row["share_of_macs"],
        "parameters": row["share_of_parameters"],
    }
    bars = "".join(
        f"<dt>{name}</dt>"
        f'<dd><span class="bar" style="--share:{share:.1%}" aria-hidden="true"></span>'
        f"{share:.1%}</dd>"
        for name, share in facts.items()
    )
    items = "".join(f"<li>{text(prompt)}</li>" for prompt in _samples(files, row["directory"]))
    drawn = [
        charts.picture(picture(files.folder / file), f"expert {index}: {prompt}")
        for file, prompt in _drawn(files.images, index)
    ]
    return "\n".join(
        [
            f'<article class="card"><h3>Expert {index}</h3>',
            f"<dl>{bars}</dl>",
            f"<ul>{items}</ul>" if items else "",
            f'<div class="drawn">{"".join(drawn)}</div>' if drawn else "",
            "</article>",
        ]
    )


def _samples(files: Files, directory: str) -> list[str]:
    """Some of the prompts of an expert, from all over a split; unseen ones if there are."""
    for split in ("val", "test", "train"):
        prompts = list(dict.fromkeys(files.texts.get(directory, {}).get(split, [])))
        if prompts:
            num = min(_NUM_PROMPTS, len(prompts))
            return [prompts[(2 * i + 1) * len(prompts) // (2 * num)] for i in range(num)]
    return []


def _drawn(images: Mapping[str, Any], index: int) -> list[tuple[str, str]]:
    """File and prompt of the first pictures that an expert drew."""
    routed = images.get("models", {}).get("routed", {})
    rows = zip(routed.get("expert", []), routed.get("files", []), images.get("prompts", []))  # noqa: B905
    return [(file, prompt) for expert, file, prompt in rows if expert == index][:_NUM_PICTURES]


def _heat(experts: Mapping[str, Any]) -> str:
    """The share of units that each expert keeps of every site: a table a block of the UNet."""
    units, rows = experts["dense"].get("units", {}), experts["experts"]
    blocks: dict[str, list[str]] = {}
    for site in units:
        if not site.endswith(".depth"):
            blocks.setdefault(charts.block(site), []).append(site)
    if not blocks:
        return ""
    tables = []
    head = "".join(f'<th scope="col">{index}</th>' for index in range(len(rows)))
    for block, names in blocks.items():
        body = "\n".join(
            f'<tr><th scope="row">{text(_site(name))}</th>'
            + "".join(_cells(name, units[name], rows))
            + "</tr>"
            for name in names
        )
        label = f"units kept in {block}, by expert, in percent"
        tables.append(
            f'<div class="scroll" role="region" aria-label="{text(label)}" tabindex="0">'
            f'<table class="heat" aria-label="{text(label)}"><thead><tr><th scope="col">'
            f"{text(block)}</th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
        )
    return "\n".join(
        [
            "<h3>What each expert keeps</h3>",
            '<p class="note">Percent of the heads, of the runs of neurons in a feed-forward, and of'
            " the groups of channels in a ResNet that stay, by block from input to output; one"
            " column an expert. 0: the whole ResNet or transformer is gone."
            ' <span class="legend">0 <span class="ramp" aria-hidden="true"></span> 100 %</span>'
            "</p>",
            f'<div class="blocks" style="--num:{len(rows)}">',
            *tables,
            "</div>",
        ]
    )


def _cells(site: str, units: int, rows: list[Mapping[str, Any]]) -> Iterator[str]:
    for index, row in enumerate(rows):
        kept = _num_kept(site, row["kept"])
        words = f"expert {index}, {site}: {kept} of {units}"
        share = kept / units
        yield f'<td style="--share:{share:.0%}" title="{text(words)}">{100 * share:.0f}</td>'


def _num_kept(site: str, kept: Mapping[str, int]) -> int:
    """Units of a site that an expert has; none, named or not, if the block around it is gone."""
    found = re.match(r"(.*\.(?:resnets|attentions)\.\d+)", site)
    return 0 if found and kept.get(f"{found[1]}.depth") == 0 else kept.get(site, 0)


def _site(name: str) -> str:
    """Returns "ResNet 1", or "cross-attention 0" for one in the first transformer of a block."""
    number = re.search(r"(?:resnets|attentions)\.(\d+)", name)
    kind = next((word for key, word in _SITES.items() if f".{key}" in name), name)
    return f"{kind} {number[1]}" if number else kind


def _numbers(files: Files) -> str:
    """Every expert in numbers; losses on unseen prompts, if it was fine-tuned."""
    trained = {
        row["directory"]: row for row in files.finetuned.get("experts", []) if row["after"]
    }  # as far as it was measured
    columns = ["expert", "prompts to learn from", "MACs, of dense", "parameters, of dense"]
    rows = [
        [
            str(index),
            f"{row['prompts'].get('train', 0):,}",
            f"{_count(row['macs'])}, {row['share_of_macs']:.1%}",
            f"{_count(row['parameters'])}, {row['share_of_parameters']:.1%}",
            *(
                _loss(trained.get(row["directory"], {}), when)
                for when in (("before", "after") if trained else ())
            ),
        ]
        for index, row in enumerate(files.experts["experts"])
    ]
    caption = "Every expert in numbers."
    if trained:
        columns += ["loss, as cut", "loss, trained"]
        caption += " The loss is that of its training, on unseen prompts."
    skipped = files.finetuned.get("skipped", [])
    if skipped:
        caption += (
            f" Not trained, for want of prompts: {', '.join(f'{int(name)}' for name in skipped)}."
        )
    return charts.table(caption, columns, rows, "layers")


def _balance(assigned: Mapping[str, Any]) -> str:
    splits = {name: split for name, split in assigned["splits"].items() if name in _SPLITS}
    labels = {
        "largest_share": "Most prompts of one expert",
        "smallest_share": "Fewest prompts of one expert",
        "macs": "MACs of the average prompt, of dense",
        "macs_over_budget": "The same, against what was asked",
    }
    rows = [["Prompts", *(f"{sum(split['prompts']):,}" for split in splits.values())]]
    rows += [["Experts without a prompt", *(len(split["dead"]) for split in splits.values())]]
    for key, label in labels.items():
        form = "+.2%" if key == "macs_over_budget" else ".2%"
        rows.append([label, *(f"{split[key]:{form}}" for split in splits.values())])
    for name, label in _INFORMATION.items():
        if all(name in split for split in splits.values()):
            rows.append([label, *(f"{split[name]:.3f} nats" for split in splits.values())])
    even = 1 / len(assigned["macs_of_experts"])
    caption = (
        f"Balance and budget. Asked for are {assigned['macs_budget']:.1%} of the MACs; in equal"
        f" shares, each expert has {even:.1%} of the prompts. Two experts differ in"
        f" {assigned['units_that_differ']:.1%} of all units. Information: what the expert of a"
        " prompt tells of its style or subject; by chance, of shuffled ones."
    )
    return charts.table(caption, ["", *(_SPLITS[name] for name in splits)], rows)


def _loss(row: Mapping[str, Any], when: str) -> str:
    loss = row.get(when, {}).get("val_loss")
    return "" if loss is None else f"{loss:.4g}"


def _count(num: int | float) -> str:
    """The number in the largest unit, of 1000, that leaves at least 1."""
    power = min(4, (len(str(int(num))) - 1) // 3)
    unit = ("", "k", "M", "G", "T")[power]
    return f"{num / 1000**power:.{1 if power else 0}f}\N{NO-BREAK SPACE}{unit}".rstrip()
