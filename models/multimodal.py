"""Pictures -> patches -> a few capsules -> recursive reasoning along K paths -> an answer.

B batch, K paths, N positions of the core, P patches, D width, L answer, V symbols, T steps, R x C cells of a page. The
recursion is that of the Tiny Recursive Model (arXiv 2510.04871): a step is one segment of the core and one optimizer
step, and the next step starts from its states. A task is a dict: kind (text or grid), rows and cols of its page,
length L of its answer, causal (a decoder writes the answer; else slot by slot), cells per patch, ids (number of rows in
its table of rules, 0: no table).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.codebook import Codebook
from models.decoder import Decoder
from models.glyphs import BEGIN, CELL_HEIGHT, CELL_WIDTH, PADDING, SYMBOLS, to_float, to_patches
from models.halting import QNet
from models.hrm import ROPE_BASE, NoRotation
from models.memory import Memory, resize_memory
from models.planning import all_paths, pick, put, select, share_winner, starts
from models.transformer import Rotary
from models.trm import Core, boxes, inner_width, offsets, rms

DECAY, REVIVE = 0.99, 0.025  # of the codebook: what codebook.py recommends for 4,000 steps and more
LATE = "memory.", "agent."  # name prefixes of parameters that have no gradient in the first steps
TABLES = "page_places.", "answer_places.", "embedding.", "decoder.embedding."  # prefixes of tables used row by row


def log_stablemax(logits):
    """Return log(s(x) / sum s), s(x) = x + 1 above 0, 1 / (1 - x) below (arXiv 2501.04697): (..., V) -> (..., V)."""
    s = logits.clamp_min(0).log1p() - (-logits.clamp_max(0)).log1p()
    return s - s.logsumexp(-1, keepdim=True)


class Places(nn.Module):
    """A vector for each place of a page: a row vector plus a column vector."""

    def __init__(self, pages, *, d_model, std):
        """pages: (rows, columns) of each page size. std: of the initial vectors."""
        super().__init__()
        rows, columns = map(max, zip(*pages, strict=True))
        self.rows = nn.Parameter(std * torch.randn(rows, d_model))
        self.columns = nn.Parameter(std * torch.randn(columns, d_model))

    def forward(self, rows, columns):
        """Return the vectors of a page of rows x columns, at most the largest of `pages`: (rows * columns, D)."""
        return (self.rows[:rows, None] + self.columns[None, :columns]).flatten(0, 1)


class Quantizer(nn.Module):
    """Replace each capsule by `groups` codes of one codebook: (B, N, D) -> (B, N, D).

    In training half of the samples skip the codes, as in Mimi (arXiv 2410.00037). At first capsules hardly differ
    between pages. Codes would remove even that difference, and the rest of the model would never learn to read them.
    """

    def __init__(self, *, d_model, size, dim, groups, beta):
        """size: codes in the codebook. dim: width of a code. groups: codes per capsule. beta: as in Codebook."""
        super().__init__()
        self.shape = groups, dim
        self.bits = groups * math.log2(size)  # per capsule
        self.down, self.up = (
            nn.Linear(a, b, bias=False) for a, b in ((d_model, groups * dim), (groups * dim, d_model))
        )
        self.codebook = Codebook(size=size, dim=dim, beta=beta, decay=DECAY, revive=REVIVE, eps=1e-5)

    def vectors(self, capsules):
        """Return the vectors that codes replace, of length 1: (B, N, D) -> (B, N, groups, dim)."""
        return F.normalize(self.down(capsules).float().unflatten(-1, self.shape), dim=-1)

    def forward(self, capsules, skip):
        """capsules (B, N, D), skip (B): no codes -> capsules (B, N, D), codes (B, N, groups) int64, commitment loss."""
        vectors = self.vectors(capsules)
        q, index, commit = self.codebook(vectors)
        q = torch.where(skip[:, None, None, None], vectors, q)
        return self.up(q.flatten(-2)), index, commit


def adapt_checkpoint(weights, old, new):
    """Fit saved `weights` of a model with arguments `old` to arguments `new` -> dict(model_state, model_args).

    Only arguments that need no new training follow `new`: a memory of another size keeps its newest entries, fewer
    paths keep the first ones, and gradient checkpointing goes on or off. All other arguments stay as in `old`.
    """
    weights = dict(weights)
    args = dict(old)
    prefix = "memory."
    args["enable_gradient_checkpointing"] = new["enable_gradient_checkpointing"]
    if old["enable_memory"] and new["enable_memory"] and old["memory_slots"] != new["memory_slots"]:
        buffers = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
        weights |= {prefix + name: x for name, x in resize_memory(buffers, new["memory_slots"]).items()}
    if not new["enable_memory"] or old["enable_memory"]:
        args["memory_slots"] = new["memory_slots"]
    if new["paths"] < old["paths"]:
        weights["starts"] = weights["starts"][: new["paths"]]
        args["paths"] = new["paths"]
    return dict(model_state=weights, model_args=args)


class Multimodal(nn.Module):
    """Encoder, reasoner and decoder for several tasks: model(carry, batch) -> (carry, outputs)."""

    def __init__(self, *, tasks, hidden_size, num_heads, H_cycles, L_cycles, L_layers, mixer, norm, relation_bias,
                 bottleneck, num_capsules, augment, supervision_steps, text_supervision_steps, loss, paths,
                 latent_planning_depth, use_vq_codebook, vq_size, vq_dim, vq_groups, vq_beta, enable_memory,
                 memory_slots, memory_dim, memory_top_k, enable_mtp, decoder_layers, enable_dqn,
                 enable_gradient_checkpointing):  # fmt: skip
        """Arguments as in train_multimodal.MultimodalConfig; tasks is {name: task}, see the file's docstring.

        supervision_steps, text_supervision_steps: T of grids and of text. bottleneck: `capsules`, `patches` (the core
        sees all of them) or `tokens` (symbols instead of pictures). mixer, norm: as in trm.Core. relation_bias: boxes
        of a Sudoku, offsets of other grids; only for a single task. loss: of slots; a decoder always uses softmax.
        paths: K, 1 is the plain model; every latent_planning_depth steps all paths continue from the best one.
        forward: states and pages (B, R, C) -> new states and logits (B, L, V).
        Raises ValueError for arguments that do not go together.
        """
        super().__init__()
        D = hidden_size
        only, *others = tasks.values()  # `only` is used where a single task is required
        names = " ".join(tasks)
        if D % (2 * num_heads):
            raise ValueError(f"hidden_size {D} over num_heads {num_heads}: the head dim must be whole and even")
        self.tasks, self.bottleneck, self.augment, self.loss = tasks, bottleneck, augment, loss
        self.planning_depth, self.num_capsules = latent_planning_depth, num_capsules
        self.limits = dict(grid=supervision_steps, text=text_supervision_steps)
        capsules = bottleneck == "capsules"
        causal = [task for task in tasks.values() if task["causal"]]
        if mixer == "mlp_t" and others:
            raise ValueError(f"mixer mlp_t has one fixed length, found tasks {names}\ntry: tasks={next(iter(tasks))}")
        if use_vq_codebook and not capsules:
            raise ValueError(
                f"use_vq_codebook needs bottleneck capsules, found bottleneck {bottleneck}\ntry: use_vq_codebook=false"
            )
        if enable_mtp and not causal:
            raise ValueError(f"enable_mtp needs a task with a decoder, found tasks {names}\ntry: enable_mtp=false")
        if relation_bias and (others or only["kind"] != "grid" or capsules or mixer != "attention" or only["ids"]):
            raise ValueError(
                "relation_bias needs a single grid task without rules, bottleneck patches or tokens, and mixer "
                f"attention, found tasks {names}, bottleneck {bottleneck}, mixer {mixer}\ntry: relation_bias=false"
            )

        # input: symbols or patches, their places, the task and its rules
        kinds = {task["kind"]: task["cells"] for task in tasks.values()}
        if bottleneck == "tokens":
            self.embedding = nn.Embedding(SYMBOLS, D)
            nn.init.normal_(self.embedding.weight, std=D**-0.5)
        else:
            size = CELL_HEIGHT * CELL_WIDTH
            self.look = nn.ModuleDict({kind: nn.Linear(size * cells, D) for kind, cells in kinds.items()})
        boxed = only["rows"] == only["cols"] in (4, 6, 9)  # a Sudoku
        if boxed or not relation_bias:  # otherwise the offsets of the relation bias carry the position
            self.page_places = Places(map(self.shape_of, tasks.values()), d_model=D, std=0.02)
        if slots := [(task["rows"], task["cols"]) for task in tasks.values() if self.has_slots(task)]:
            self.answer_places = Places(slots, d_model=D, std=0.5)  # the only difference between slots
        self.task = nn.ParameterDict({name: torch.zeros(D) for name in tasks})
        if rules := max(task["ids"] for task in tasks.values()):
            self.rules = nn.Embedding(rules, D, sparse=True)
            nn.init.zeros_(self.rules.weight)

        # reasoning: encoder of capsules and core; lengths only matter to mlp_t, which has a single task
        sizes = dict(d_model=D, n_heads=num_heads, core="recursive", core_layers=L_layers, share=True, mixer=mixer,
                     norm=norm, h_cycles=H_cycles, l_steps=L_cycles, grad="last_cycle", ffn_dim=inner_width(D),
                     recompute=enable_gradient_checkpointing)  # fmt: skip
        seen = [num_capsules + math.prod(self.shape_of(task)) for task in tasks.values()]
        lengths = [self.length_of(task) for task in tasks.values()]
        if capsules:
            self.capsule_tokens = nn.Parameter(torch.randn(num_capsules, D))
            self.encoder = Core(**sizes, relation=None, length=seen[0])
        relation = None
        if relation_bias:
            relation = boxes(only["length"], num_heads) if boxed else offsets(only["rows"], only["cols"], num_heads)
        self.core = Core(**sizes, relation=relation, length=lengths[0])
        self.rotary = NoRotation() if relation_bias else Rotary(D // num_heads, max(seen + lengths), ROPE_BASE)
        self.register_buffer("starts", starts(self.core.start_L, paths))

        # optional parts between encoder and core
        if use_vq_codebook:
            self.quantizer = Quantizer(d_model=D, size=vq_size, dim=vq_dim, groups=vq_groups, beta=vq_beta)
        if enable_memory:
            self.memory = Memory(slots=memory_slots, key_dim=memory_dim, d_model=D, top_k=memory_top_k)

        # output: head of slots, decoder of text, logits of when to stop
        if len(causal) < len(tasks):
            self.head = nn.Linear(D, SYMBOLS, bias=False)
            nn.init.normal_(self.head.weight, std=D**-0.5)
        if causal:
            longest = max(task["length"] for task in causal)
            self.decoder = Decoder(symbols=SYMBOLS, begin=BEGIN, d_model=D, n_heads=num_heads, layers=decoder_layers,
                                   length=longest, mtp=enable_mtp)  # fmt: skip
        self.mtp = enable_mtp
        if enable_dqn:
            self.agent = QNet(d_model=D)
        self.halt = nn.Linear(D, 1)
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, -5.0)

    # --- shapes ---------------------------------------------------------------------------
    def has_slots(self, task):
        """Whether the core gets extra slots for the answer; otherwise cells are answered at their own positions."""
        return not task["causal"] and (self.bottleneck == "capsules" or task["kind"] == "text")

    def shape_of(self, task):
        """Return rows and columns of a page in symbols or patches; augmented pages are one cell larger each way."""
        more = int(self.augment and task["kind"] == "text" and self.bottleneck != "tokens")
        cells = 1 if self.bottleneck == "tokens" else task["cells"]
        return task["rows"] + more, -(-(task["cols"] + more) // cells)

    def length_of(self, task):
        """Return N: one for a rule, capsules or page, answer slots."""
        seen = self.num_capsules if self.bottleneck == "capsules" else math.prod(self.shape_of(task))
        return bool(task["ids"]) + seen + self.has_slots(task) * task["length"]

    def sizes(self):
        """Describe the number of parameters of each part, in millions."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}
        return ", ".join(f"{name} {count / 1e6:.2f}" for name, count in counts.items() if count)

    # --- parts ----------------------------------------------------------------------------
    def see(self, batch):
        """Embed the page (B, R, C) of a batch, or its patches (B, P, pixels) if it has them: (B, P, D)."""
        task = self.tasks[batch["task"]]
        places = self.page_places(*self.shape_of(task)) if hasattr(self, "page_places") else 0
        if self.bottleneck == "tokens":
            return rms(self.embedding(batch["page"].flatten(1).long()) * self.embedding.embedding_dim**0.5 + places)
        patches = batch["patches"] if "patches" in batch else to_float(to_patches(batch["page"], task["cells"]))
        return rms(self.look[task["kind"]](patches) + places)

    def capsules(self, seen):
        """Encode a page (B, P, D) into capsules (B, capsules, D), the first positions of the encoder's z_H."""
        seen = torch.cat([self.capsule_tokens.expand(len(seen), -1, -1).to(seen.dtype), seen], 1)
        return self.encoder(seen, *self.encoder.start(seen), self.rotary, None)[0][:, : self.num_capsules]

    def perceive(self, batch):
        """Build the input of the core: batch -> x (B, N, D), {vq_loss}, {codes (B, capsules, groups)}.

        The two dicts are empty without a codebook.
        """
        task = self.tasks[batch["task"]]
        losses = {}
        codes = {}
        x = self.see(batch)
        if self.bottleneck == "capsules":
            x = self.capsules(x)
            if hasattr(self, "quantizer"):
                skip = (batch["index"] % 2 == 0) & self.training  # by sample number: the same on any rank, after resume
                x, codes["codes"], losses["vq_loss"] = self.quantizer(x, skip)
        if task["ids"]:
            x = torch.cat([self.rules(batch["id"])[:, None].to(x.dtype), x], 1)
        if self.has_slots(task):
            places = self.answer_places(task["rows"], task["cols"])
            x = torch.cat([x, places.expand(len(x), -1, -1).to(x.dtype)], 1)
        x = x + self.task[batch["task"]]
        if hasattr(self, "memory"):
            x = self.memory.read(x, batch["index"])
        return x, losses, codes

    def confidence(self, z_H):
        """Return the logit that all symbols of the answer are right: z_H (..., N, D) -> (...)."""
        return self.halt(z_H.mean(-2))[..., 0].float()

    def answer(self, name, x, z_H, target):
        """Answer task `name`: x, z_H (B, N, D) -> logits (B, L, V), hidden states of the decoder (B, L, D) or None.

        A decoder reads the right answer, target (B, L), shifted by one.
        """
        task = self.tasks[name]
        if task["causal"]:
            h = self.decoder(target.long(), x + z_H)
            return self.decoder.logits(h), h
        return self.head(z_H[:, -task["length"] :]), None

    def nats(self, name, logits, target):
        """Nats of each symbol of the answer, 0 for PADDING: logits (B, L, V), target (B, L) -> (B, L)."""
        logits, target = logits.float(), target.long()
        softmax = self.tasks[name]["causal"] or self.loss == "softmax"
        log = logits.log_softmax(-1) if softmax else log_stablemax(logits)
        return F.nll_loss(log.flatten(0, 1), target.flatten(), ignore_index=PADDING, reduction="none").view_as(target)

    # --- a step ---------------------------------------------------------------------------
    def limit(self, name):
        """Return T, the largest number of steps for a sample of task `name`."""
        return self.limits[self.tasks[name]["kind"]]

    def initial_carry(self, batch):
        """Return the carry before the first step, in which all samples are new.

        A dict of z_H, z_L (B, K, N, D), steps, halted (B), and the last answer (B, L).
        """
        task = self.tasks[batch["task"]]
        B = len(batch["page"])
        device = batch["page"].device
        z = torch.zeros(B, len(self.starts), self.length_of(task), self.starts.shape[1], device=device)
        answer = torch.zeros(B, task["length"], dtype=torch.uint8, device=device)
        steps = torch.zeros(B, dtype=torch.long, device=device)
        halted = torch.ones(B, dtype=torch.bool, device=device)
        return dict(z_H=z, z_L=z.clone(), steps=steps, halted=halted, answer=answer)

    def fresh(self, carry, dtype):
        """Restart the samples that halted -> states z_H, z_L (B, K, N, D), steps of each sample so far (B)."""
        new = carry["halted"][:, None, None, None]
        z_H = torch.where(new, self.core.start_H.to(dtype), carry["z_H"].to(dtype))
        z_L = torch.where(new, self.starts[:, None].to(dtype), carry["z_L"].to(dtype))
        return z_H, z_L, carry["steps"].masked_fill(carry["halted"], 0)

    def forward(self, carry, batch):
        """Run one step of each sample -> (carry, outputs).

        batch: task (its name), page (B, R, C) uint8 or patches, target (B, L) uint8, index (B) sample numbers, id (B)
        of a rule, explore (B): a path that wins in any case, or -1. Where a sample has halted, `batch` holds a new one.
        outputs: logits (B, L, V) and q_halt (B) of the winner, path (B), and aux. aux holds the losses that are on (ce,
        halt_loss, vq_loss, mtp_loss) and, without gradient, per sample: accuracy, right, changed, confidence,
        paths_right (B, K), x_mean, z_mean (B, D), and codes and acceptance where they exist.
        """
        name, target = batch["task"], batch["target"]
        scored = target != PADDING
        x, losses, metrics = self.perceive(batch)
        z_H, z_L, steps = self.fresh(carry, x.dtype)
        B, K = z_H.shape[:2]
        path = torch.zeros_like(steps)
        if K == 1:
            winner = self.core(x, z_H[:, 0], z_L[:, 0], self.rotary, None)
            z_H, z_L = (z.detach()[:, None] for z in winner)
            halt = self.confidence(winner[0])[:, None]  # (B, K)
        else:
            before, (z_H, z_L) = all_paths(self.core, x, z_H, z_L, self.rotary)
            with torch.no_grad():
                wide = target.repeat_interleave(K, 0)
                logits, _ = self.answer(name, x.repeat_interleave(K, 0), z_H.flatten(0, 1), wide)
                cost = self.nats(name, logits, wide).sum(1).view(B, K)
                metrics["paths_right"] = self.hits(logits, wide).all(1).view(B, K)
            path = torch.where(batch["explore"] < 0, cost.argmin(1), batch["explore"])
            # only the winner gets gradients: its last cycle runs again
            winner = self.core(x, *(pick(z, path) for z in before), self.rotary, None, first=-1)
            z_H, z_L = (put(z, path, new.detach()) for z, new in zip((z_H, z_L), winner, strict=True))
            halt = put(self.confidence(z_H), path, self.confidence(winner[0]))
        logits, h = self.answer(name, x, winner[0], target)
        losses["ce"] = (self.nats(name, logits, target).sum(1) / scored.sum(1)).mean()
        with torch.no_grad():
            answer = logits.argmax(-1).to(torch.uint8)
            hit = self.hits(logits, target)
            right = hit.all(1)[:, None].expand(-1, K) if K == 1 else put(metrics["paths_right"], path, hit.all(1))
            length = scored.sum(1)
            metrics |= dict(
                accuracy=(hit & scored).sum(1) / length,
                right=hit.all(1),
                paths_right=right,
                changed=((answer != carry["answer"]) & scored).sum(1) / length,
                confidence=(logits.float().softmax(-1).amax(-1) * scored).sum(1) / length,
                x_mean=x.mean(1).float(),
                z_mean=winner[0].mean(1).float(),
            )
        losses["halt_loss"] = F.binary_cross_entropy_with_logits(halt, right.float())
        if self.mtp and h is not None:
            guess = self.decoder.logits(self.decoder.ahead(h, target.long()))
            nats = self.nats(name, guess, target[:, 1:])
            losses["mtp_loss"] = (nats.sum(1) / scored[:, 1:].sum(1).clamp_min(1)).mean()
            same = (guess.argmax(-1) == answer[:, 1:]) & scored[:, 1:]
            metrics["acceptance"] = same.sum() / scored[:, 1:].sum().clamp_min(1)
        steps = steps + 1
        z_H = share_winner(z_H, path, steps % self.planning_depth == 0)
        carry = dict(z_H=z_H, z_L=z_L, steps=steps, halted=steps >= self.limit(name), answer=answer)
        return carry, dict(logits=logits, q_halt=pick(halt, path).detach(), path=path, aux=losses | metrics)

    def hits(self, logits, target):
        """Whether each symbol is right; PADDING always is: logits (B, L, V), target (B, L) -> (B, L)."""
        return (logits.argmax(-1) == target) | (target == PADDING)

    # --- use ------------------------------------------------------------------------------
    @torch.no_grad()
    def trace(self, batch, *, steps, paths=0, noise=0.0, generator=None):
        """Reason about a batch for T = `steps` steps -> dict of the results after each step.

        paths: number of paths, 0 as trained; more paths repeat the starts. noise: standard deviation of the noise added
        to the states before each step. Results: answers (T, B, K, L) uint8; halt (T, B, K), logits that the answer is
        right; nats (T, B, K) of the target (a decoder reads the right answer so far). Also x (B, N, D), codes, and z_H
        of the last step (B, K, N, D).
        """
        x, _, codes = self.perceive(batch)
        K = paths or len(self.starts)
        name = batch["task"]
        first = self.starts[torch.arange(K, device=x.device) % len(self.starts)]
        z_H = self.core.start_H.to(x.dtype).expand(len(x), K, *x.shape[1:])
        z_L = first[:, None].to(x.dtype).expand_as(z_H)
        wide, target = x.repeat_interleave(K, 0), batch["target"].repeat_interleave(K, 0)
        results = dict(answers=[], halt=[], nats=[])
        for step in range(steps):
            if noise:
                z_H, z_L = (z + noise * torch.randn(z.shape, generator=generator).to(z) for z in (z_H, z_L))
            states = self.core(wide, z_H.flatten(0, 1), z_L.flatten(0, 1), self.rotary, None)
            z_H, z_L = (z.unflatten(0, (-1, K)) for z in states)
            logits, _ = self.answer(name, wide, states[0], target)
            halt = self.confidence(z_H)
            results["answers"].append(logits.argmax(-1).to(torch.uint8).unflatten(0, (-1, K)))
            results["halt"].append(halt)
            results["nats"].append(self.nats(name, logits, target).sum(1).view(-1, K))
            if K > 1 and not noise:
                due = torch.full((len(x),), (step + 1) % self.planning_depth == 0, device=x.device)
                z_H = share_winner(z_H, halt.argmax(1), due)
        return {key: torch.stack(values) for key, values in results.items()} | codes | dict(x=x, z_H=z_H)

    @torch.no_grad()
    def write(self, batch, *, choose, end, length=0, **trace_args):
        """Write the answers of a causal task symbol by symbol -> (B, length) int64, logits that they are right (B).

        length: 0 = that of the task. choose, end: as in Decoder.generate. trace_args: arguments of `trace`.
        """
        trace = self.trace(batch, **trace_args)
        best = select(trace["answers"], trace["halt"], "score")[-1]
        memory = trace["x"] + pick(trace["z_H"], best)
        length = length or self.tasks[batch["task"]]["length"]
        symbols = self.decoder.generate(memory, length=length, end=end, choose=choose)
        return symbols, pick(trace["halt"][-1], best)

    @torch.no_grad()
    def start_codes(self, batch, generator):
        """Initialize the codebook by k-means over the capsules of a batch."""
        capsules = self.capsules(self.see(batch))
        self.quantizer.codebook.start(self.quantizer.vectors(capsules).flatten(0, -2), True, generator)

    def compiled(self):
        """Compile each stack of the cores in place -> self; weights keep their names."""
        for core in (self.core, getattr(self, "encoder", None)):
            for stack in core.stacks if core else ():
                stack.compile()
        return self
