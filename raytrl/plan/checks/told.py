"""What was found about rows, in words; and what of it is refused."""

from raytrl.errors import DataError
from raytrl.plan.checks.rows import Found, Tally
from raytrl.plan.checks.training_rows import LEFT_OUT, SAID, TrainingRows


def refuse(found: Found, rows: TrainingRows) -> None:
    """Rows that cannot be trained on.

    Raises:
        DataError: naming the first of them.
    """
    most, positions = rows.max_length, rows.positions
    if found.tally("dropped").rows == found.rows:
        raise DataError(
            f"{rows.where}: all {found.rows} rows are longer than training.max_length {most} allows; expected: a larger "
            f"training.max_length, or shorter rows"
        )
    if positions is None or not positions.is_table:
        return
    advice = (
        f"set training.max_length to {positions.most} or less, shorten the rows, or take a model with more positions"
    )
    if rows.packing == "wrapped" and most is not None and min(most, found.tokens) > positions.most:
        raise DataError(
            f"{rows.where}: packing_strategy wrapped fills rows that the model has no positions for; found: "
            f"training.max_length {most}; expected: at most {positions.most}; {advice}"
        )
    if (beyond := found.tally("beyond")).rows:
        padded = f", padded to a multiple of {rows.multiple}" if rows.multiple else ""
        raise DataError(
            f"{rows.where}: row {beyond.first}: the model has no positions for it; found: {beyond.what} tokens{padded}, and "
            f"{_rows(beyond, found)} like it; expected: at most {positions.most}; {advice}"
        )


def row_words(found: Found, rows: TrainingRows) -> str:
    """`80 rows of up to 70 tokens; 12 are longer than training.max_length 32 and cut`."""
    words = f"{found.rows:,} rows of up to {found.longest.get('', (0, 0))[0]:,} tokens"
    long, dropped = found.tally("long").rows, found.tally("dropped").rows
    if long:
        become = {"bfd_split": "split", "wrapped": "split"}.get(str(rows.packing), "cut")
        words += f"; {long:,} longer than training.max_length {rows.max_length} are {become}"
    if dropped:
        words += f"; {dropped:,} longer than training.max_length {rows.max_length} allows are left out"
    return words


def row_notices(found: Found, rows: TrainingRows, is_default: bool) -> list[str]:
    """What a user should know: one sentence for each thing.

    Args:
        is_default: whether `max_length` is TRL's own.
    """
    where, notices = rows.where, _long(found, rows, is_default)
    if (beyond := found.tally("beyond")).rows and rows.positions is not None:
        notices.append(
            f"{where}: {_rows(beyond, found)} have more tokens than the {rows.positions.most} positions that the model was "
            f"made for (max_position_embeddings); the first, row {beyond.first}, has {beyond.what}"
        )
    notices += left_out_notices(found, where)
    if (unseen := found.tally("unseen")).rows:
        notices.append(
            f"{where}: the chat template writes a prompt that waits for an answer (add_generation_prompt) in another way "
            f"than was trained on, in {unseen.rows:,} of {found.totals.get('prompts tried', 0):,} rows tried: a rollout's "
            f"prompt ends in {unseen.what[-60:]!r}, and no text of the training does (row {unseen.first})"
        )
    if (merged := found.tally("merged")).rows:
        notices.append(
            f"{where}: in {_rows(merged, found)} the prompt's last tokens are others when the completion follows, so a "
            f"rollout sees other tokens than were trained on; row {merged.first}: {merged.what[-60:]!r}; end prompts "
            f"without a blank, and begin completions with it"
        )
    if (twice := found.tally("twice")).rows:
        notices.append(twice_notice(twice, found, where, str(rows.tokenizer.bos_token)))
    if (empty := found.tally("empty")).rows:
        notices.append(
            f"{where}: {_rows(empty, found)} have no text to train on but the end token (first: row {empty.first}); leave them "
            f"out unless an empty answer is meant"
        )
    if (same := found.tally("same")).rows:
        notices.append(
            f"{where}: in {_rows(same, found)} the chosen and the rejected answer are the same, and nothing is learned from "
            f"them; row {same.first}: {same.what!r}"
        )
    if (apart := found.tally("no prompt")).rows:
        notices.append(
            f"{where}: in {_rows(apart, found)} chosen and rejected differ from their first turn on, so that nothing of them is "
            f"the prompt and what the user says is trained on (first: row {apart.first})"
        )
    if (ends := found.tally("open")).rows:
        notices.append(
            f"{where}: {_rows(ends, found)} end in a turn that is not the assistant's; row {ends.first}: {ends.what}"
        )
    return notices


def _long(found: Found, rows: TrainingRows, is_default: bool) -> list[str]:
    if not (long := found.tally("long")).rows:
        return []
    limit = f"training.max_length {rows.max_length}{', the default of TRL' if is_default else ''}"
    longest, row = found.longest[""]
    longer = f"{rows.where}: {_rows(long, found)} are longer than {limit}"
    if rows.packing in ("bfd_split", "wrapped"):
        fate = f"and are split: packing_strategy {rows.packing} trains on them in pieces"
        return [f"{longer}, {fate} (longest: row {row}, {longest:,} tokens)"]
    lost = "beginning" if rows.keeps_end else "end, the end token included"
    fate = f"they are cut and lose their {lost}, {long.amount:,} tokens in all"
    return [f"{longer}: {fate} (longest: row {row}, {longest:,} tokens)"]


def left_out_notices(found: Found, where: str) -> list[str]:
    """What a chat template does not write."""
    notices = []
    for name, tally in sorted(found.tallies.items()):
        if not name.startswith(LEFT_OUT) or not tally.rows:
            continue
        whose = name.removeprefix(LEFT_OUT)
        share = min(1.0, tally.amount / max(1, found.totals.get(SAID + whose, 0)))
        notices.append(
            f"{where}: the chat template leaves out or changes what is {whose} in {_rows(tally, found)}, {share:.0%} of its "
            f"text ({tally.amount:,} characters); row {tally.first}: {tally.what!r}"
        )
    return notices


def twice_notice(twice: Tally, found: Found, where: str, token: str) -> str:
    return (
        f"{where}: {_rows(twice, found)} begin with {token} twice: their text begins with it, and the tokenizer puts another "
        f"before it (first: row {twice.first}); leave it out of the text"
    )


def _rows(tally: Tally, found: Found) -> str:
    return f"{tally.rows:,} of {found.rows:,} rows"
