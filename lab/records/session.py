"""One bench run: its id, what it has recorded, its deadline, its progress. A stopped run is resumed by asking
again."""

import datetime
import secrets
import sys
import time

from lab.records import card, compare, schema


class Session:
    """Writes the records of one run to `out`.

    Asked again with the same settings on the same card, software, tables and commit, it continues the last
    run of the file if that was stopped (it has no "after" env row): what `has` says is recorded need not be
    measured again.
    fresh: never continue. budget_minutes: `over()` is true after that.
    """

    def __init__(self, out, device, settings, budget_minutes=None, fresh=False, notes=()):
        self.device, self.settings, self.started = device, settings, time.monotonic()
        self.deadline = None if budget_minutes is None else self.started + 60 * budget_minutes
        self.path = schema.path_of(out)
        found = schema.read(self.path, newer="skip") if self.path.exists() else schema.Records(self.path, [])
        now = card.environment("", "before", device, settings, notes)
        self.run, self.resumed = self._continue(found, now, fresh), True
        if self.run is None:
            stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
            self.run, self.resumed = f"{stamp}-{secrets.token_hex(2)}", False
        self.rows = found.of_run(self.run)
        self.done = {schema.key(r) for r in self.rows}
        self.writer = schema.Writer(self.path)
        self.notices = found.notices + self.writer.notices
        self.new = 0
        if not self.resumed:
            now.run = self.run
            self.add(now)

    @staticmethod
    def _continue(found, now, fresh):
        """The id of the run to continue, or None."""
        envs = [r for r in found.rows if r.kind == "env"]
        last = next((e for e in reversed(envs) if e.when == "before"), None)
        if fresh or last is None or any(e.run == last.run and e.when == "after" for e in envs):
            return None
        same = last.settings == now.settings and compare.same_setting(last, now)
        return last.run if same else None

    def add(self, *rows):
        """Records rows at once, so that whatever happens next they are kept."""
        self.writer.append(*rows)
        self.rows += rows
        self.done |= {schema.key(r) for r in rows}
        self.new += len(rows)

    def has(self, row):
        return schema.key(row) in self.done

    def of_kind(self, kind):
        return [r for r in self.rows if r.kind == kind]

    def over(self):
        return self.deadline is not None and time.monotonic() > self.deadline

    def finish(self, complete):
        """The card's state now, when everything asked for is recorded; a run without it can be continued."""
        if complete:
            self.add(card.environment(self.run, "after", self.device, self.settings))
        self.writer.close()


class Progress:
    """A bar with the time left on stderr, where that is a terminal; nothing elsewhere. total: in about
    seconds."""

    def __init__(self, total):
        self.total, self.bar, self.running = total, None, 0.0

    def __enter__(self):
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
        return self

    def step(self, text, seconds):
        """A piece of work that takes about so long begins; the one before it is over."""
        if self.bar:
            self.bar.update(self.task, advance=self.running, description=text[:60])
        self.running = seconds

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()
