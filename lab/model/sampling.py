"""How the next token is chosen: what a user may ask for, and the steps that it adds to a decode step.

Temperature, top-k, top-p and min-p are the op `sample` (lab/ops/sample.py). Penalties, biases and
log-probabilities are a few torch operations on the logits; they run only where somebody has asked for them,
and a CUDA graph captures them with the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch

from lab.errors import LabError
from lab.ops.sample import TABLE_COLUMNS, check_options, table_row

MAX_LOGPROBS = 20  # most likely tokens of a step, besides the chosen one


def is_pair(given) -> bool:
    """Whether it is a token's id and a number."""
    return (
        isinstance(given, (tuple, list))
        and len(given) == 2
        and type(given[0]) is int
        and type(given[1]) in (int, float)
    )


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token.

    repetition_penalty: logits of tokens of the prompt and of the answer are divided by it where they are
    positive, else multiplied (1 changes nothing). presence_penalty is taken from the logit of each token
    of the answer, frequency_penalty as often as it stands there. logit_bias: (token, number added to its
    logit). logprobs: how many of the most likely tokens are reported with each token, 0 to 20; None reports
    nothing. Log-probabilities are those of the model, before all the rest. Raises LabError for numbers out of
    range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.name in ("top_k", "seed", "logprobs")
            if field.name == "logit_bias" or (field.name == "logprobs" and value is None):
                continue
            if type(value) is bool or not isinstance(value, int if whole else (int, float)):
                raise LabError(f"{field.name} {value!r}: it must be a{' whole' if whole else ''} number")
        check_options(self.temperature, self.top_k, self.top_p, self.seed, self.min_p)
        if not 1e-3 <= self.repetition_penalty <= 1e3:
            raise LabError(f"repetition_penalty {self.repetition_penalty}: it must be from 0.001 to 1000")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= 100:
                raise LabError(f"{name} {getattr(self, name)}: it must be from -100 to 100")
        if not isinstance(self.logit_bias, (tuple, list)) or not all(map(is_pair, self.logit_bias)):
            raise LabError(
                f"logit_bias {self.logit_bias!r}: write pairs of a token and a number, as ((42, -5),)"
            )
        object.__setattr__(self, "logit_bias", tuple(map(tuple, self.logit_bias)))
        tokens = [token for token, _ in self.logit_bias]
        if len(set(tokens)) != len(tokens):
            raise LabError("logit_bias names a token twice")
        for token, bias in self.logit_bias:
            if token < 0 or not abs(bias) <= 1e9:
                raise LabError(f"logit_bias {token}: {bias}: it must be a token's id and a number up to 1e9")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise LabError(f"logprobs {self.logprobs}: it must be from 0 to {MAX_LOGPROBS}")

    @property
    def greedy(self) -> bool:
        """Whether the token is the largest of the model's own logits."""
        return self.temperature == 0 and not self.adjusts

    @property
    def needs_all_logits(self) -> bool:
        """Whether more is asked for than where the largest logit is: a rank of several has a part of them."""
        return not self.greedy or self.logprobs is not None

    @cached_property  # asked of each row whenever the rows of a batch change
    def adjusts(self) -> bool:
        """Whether it changes logits."""
        penalties = self.repetition_penalty, self.presence_penalty, self.frequency_penalty
        return penalties != (1, 0, 0) or bool(self.logit_bias)

    @property
    def shared(self) -> bool:
        """Whether arguments of the op `sample` say all of it, the same for every row of a batch."""
        return not self.adjusts and self.logprobs is None


GREEDY = Sampling()
ONE_PART = (
    "with --tensor-parallel each rank has a part of the logits, so tokens are greedy yet: leave out "
    "--temperature, penalties, --logit-bias and --logprobs"
)


@dataclass(frozen=True)
class ByRow:
    """A step in which every row has its own Sampling, which RowSampling holds on the device.

    It says what the step has to do for any of the rows, so that few kinds of steps must be captured: draws:
    whether a row has a temperature; adjusts: whether one changes its logits; logprobs: whether one reports
    log-probabilities.
    """

    draws: bool = False
    adjusts: bool = False
    logprobs: bool = False

    @classmethod
    def of(cls, rows: Collection[Sampling]) -> ByRow | Sampling:
        """The least step that does what all of `rows` ask for; GREEDY where that is enough."""
        kind = cls(
            any(s.temperature > 0 for s in rows),
            any(s.adjusts for s in rows),
            any(s.logprobs is not None for s in rows),
        )
        return GREEDY if kind == cls() else kind

    @property
    def greedy(self) -> bool:
        return not (self.draws or self.adjusts)

    @property
    def needs_all_logits(self) -> bool:
        return not self.greedy or self.logprobs


class RowSampling:
    """What each row of a batch samples by, on the device, and the log-probabilities of the last step.

    table int32 [batch, 6]: of the op `sample`. logprob float32 [batch], of each row's token; top_logprobs
    float32 and top_tokens int64 [batch, MAX_LOGPROBS], in falling order. What belongs to penalties, some
    bytes for each token of the vocabulary, is allocated when a row first asks for it.
    """

    def __init__(self, batch: int, vocab: int, device):
        self.batch, self.vocab, self.device = batch, vocab, device
        self.table = torch.zeros(batch, TABLE_COLUMNS, dtype=torch.int32, device=device)
        greedy = table_row(0.0, 0, 1.0, 0, 0.0)
        self.table[:] = torch.tensor(greedy, dtype=torch.int32)
        self.known = [greedy] * batch  # the table, on the host
        most = min(MAX_LOGPROBS, vocab)
        self.logprob = torch.zeros(batch, device=device)
        self.top_logprobs = torch.zeros(batch, most, device=device)
        self.top_tokens = torch.zeros(batch, most, dtype=torch.int64, device=device)
        self.penalties = None  # float32 [3, batch, 1]: repetition, presence, frequency
        self.adjusted_rows: set[int] = set()  # all whose penalties or biases may change logits

    @torch.inference_mode(False)  # a step may allocate them, and what follows a step writes to them, too
    def allocate_penalties(self) -> None:
        """The tensors of adjust(); the same ones from then on, as captured graphs have their addresses."""
        if self.penalties is not None:
            return
        shape = self.batch, self.vocab
        self.penalties = torch.zeros(3, self.batch, 1, device=self.device)
        self.penalties[0] = 1
        self.in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)  # of the answer's tokens
        self.bias = torch.zeros(shape, device=self.device)
        self.adjusted = torch.zeros(shape, device=self.device)

    def set(self, row: int, sampling: Sampling, prompt: Sequence[int], output: Sequence[int] = ()) -> None:
        """The row's next token is chosen by `sampling`, after the tokens of its prompt and its answer so far.

        Raises LabError for a bias of a token that the vocabulary lacks.
        """
        wrong = [token for token, _ in sampling.logit_bias if token >= self.vocab]
        if wrong:
            raise LabError(f"logit_bias: token id {wrong[0]} is outside the vocabulary of {self.vocab}")
        s = sampling
        own = table_row(s.temperature, s.top_k, s.top_p, s.seed, s.min_p)
        # All copies to the device are asynchronous: a blocking one would wait for the step that it works on.
        if own != self.known[row]:
            self.known[row] = own
            send(self.table[row], own)
        if not s.adjusts and row not in self.adjusted_rows:
            return
        self.allocate_penalties()
        numbers = [s.repetition_penalty, s.presence_penalty, s.frequency_penalty]
        send(self.penalties[:, row, 0], numbers)
        self.in_prompt[row], self.counts[row], self.bias[row] = False, 0, 0.0
        if not s.adjusts:
            self.adjusted_rows.discard(row)
            return
        self.adjusted_rows.add(row)
        indices = lambda ids: torch.tensor(ids, dtype=torch.int64).to(self.device, non_blocking=True)
        self.in_prompt[row, indices(list(prompt))] = True
        ones = torch.ones(len(output), dtype=torch.int32, device=self.device)
        self.counts[row].index_add_(0, indices(list(output)), ones)
        if s.logit_bias:
            tokens, biases = zip(*s.logit_bias)
            values = torch.tensor(biases, dtype=torch.float32).to(self.device, non_blocking=True)
            self.bias[row, indices(tokens)] = values

    def move(self, source: int, to: int) -> None:
        """A row's sequence goes on in another row."""
        if self.known[to] != self.known[source]:
            self.known[to] = self.known[source]
            self.table[to] = self.table[source]
        if self.adjusted_rows & {source, to}:
            self.adjusted_rows.add(to)
            self.penalties[:, to] = self.penalties[:, source]
            for tensor in (self.in_prompt, self.counts, self.bias):
                tensor[to] = tensor[source]

    def adjust(self, logits: torch.Tensor) -> torch.Tensor:
        """logits float32 [rows, vocab] of the first rows of the batch, after penalties and biases, in a
        tensor of its own. A NaN stays one."""
        rows = logits.shape[0]
        repetition, presence, frequency = self.penalties[:, :rows]
        counts, out = self.counts[:rows], self.adjusted[:rows]
        answered = counts > 0
        factor = torch.where(logits > 0, 1 / repetition, repetition)
        torch.mul(logits, torch.where(answered | self.in_prompt[:rows], factor, 1.0), out=out)
        return out.sub_(frequency * counts).sub_(presence * answered).add_(self.bias[:rows])

    def count(self, ids: torch.Tensor, live: torch.Tensor) -> None:
        """Counts the tokens that live rows have chosen; ids, live int32 [rows], a row without a number gives
        -1 and is not counted."""
        rows = ids.shape[0]
        seen = (live * (ids >= 0)).to(torch.int32)
        self.counts[:rows].scatter_add_(1, ids.clamp(min=0).long()[:, None], seen[:, None])

    def report(self, logits: torch.Tensor, ids: torch.Tensor) -> None:
        """Log-probabilities of the model, of the chosen tokens and of the most likely ones."""
        rows = logits.shape[0]
        total = logits.logsumexp(-1, keepdim=True)
        chosen = logits.gather(1, ids.clamp(min=0).long()[:, None])
        self.logprob[:rows] = (chosen - total)[:, 0]
        values, tokens = logits.topk(self.top_tokens.shape[1], dim=-1)
        self.top_logprobs[:rows], self.top_tokens[:rows] = values - total, tokens

    def reported(self, row: int, most: int) -> tuple[float, dict[int, float]]:
        """What the last step reported of a row: of its token, and of the `most` likeliest ones."""
        values = self.top_logprobs[row, :most].tolist()
        return float(self.logprob[row]), dict(zip(self.top_tokens[row, :most].tolist(), values))


def send(out: torch.Tensor, numbers: Sequence[float]) -> None:
    """Numbers of the host to a tensor of the device, without waiting for the device."""
    out.copy_(torch.tensor(numbers, dtype=out.dtype), non_blocking=True)


def choose(b, sampling: Sampling | ByRow) -> None:
    """The end of a decode step: b.ids from b.logits. b: lab.model.plans.buffers.StepBuffers."""
    if isinstance(sampling, Sampling):
        s = sampling
        b.ops.sample(b.logits, b.positions, s.temperature, s.top_k, s.top_p, s.seed, s.min_p, out=b.ids)
        return
    logits = b.rows.adjust(b.logits) if sampling.adjusts else b.logits
    table = b.rows.table[: b.ids.shape[0]]
    b.ops.sample(logits, b.positions, table=table, out=b.ids)
    after_choice(b, sampling)


def after_choice(b, sampling: Sampling | ByRow) -> None:
    """What a step has to note of the tokens in b.ids, where rows have asked for it."""
    if isinstance(sampling, ByRow) and sampling.adjusts:
        b.rows.count(b.ids, b.live[0, : b.ids.shape[0]])
    if isinstance(sampling, ByRow) and sampling.logprobs:
        b.rows.report(b.logits, b.ids)
