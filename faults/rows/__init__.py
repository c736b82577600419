"""The table of faults. Each function injects one fault into one script and checks what must follow.

crashes.py        kills and signals
damage.py         damaged, hostile and foreign checkpoints, and which one is resumed
numbers.py        values that are not finite
ranks.py          several processes of one run
inputs.py         flags, data, tokenizers, formulas
surroundings.py   disks, folders, pipes, clocks

A row gets the lab and the name of a script. It raises AssertionError with what differed, NotRun where the fault can't
be injected, and returns what is worth telling beside `pass`.
"""

from faults.rows import crashes, damage, inputs, numbers, ranks, surroundings

ALL = "EMHSVA"  # expert, mla, hrm, sr, multimodal, ae; P is prepare_data.py
ROWS = {  # number: (fault, function, scripts by their letters, those of --ci)
    1: ("crash", crashes.crash, ALL, "E"),
    2: ("Ctrl+C", crashes.ctrl_c, ALL, "E"),
    3: ("preemption", crashes.preemption, ALL, "E"),
    4: ("doubled signal", crashes.doubled, "E", "E"),
    5: ("signal elsewhere", crashes.elsewhere, "EHV", ""),
    6: ("kill in a save", crashes.kill_in_save, "ESAV", "E"),
    7: ("truncation", damage.truncation, "EHS", "E"),
    8: ("bit rot", damage.bit_rot, ALL, ALL),
    9: ("all bad", damage.all_bad, ALL, "E"),
    10: ("named file bad", damage.named_bad, ALL, "E"),
    11: ("stale interrupted", damage.stale_interrupted, "EM", ""),
    12: ("order", damage.order, "EHS", ""),
    13: ("disk full later", surroundings.disk_full_later, "EA", ""),
    14: ("disk full at start", surroundings.disk_full_at_start, "ES", ""),
    15: ("read-only", surroundings.read_only, "EP", ""),
    16: ("non-finite", numbers.non_finite, ALL, "E"),
    17: ("fp16 overflow", numbers.overflow, "A", ""),
    18: ("changed flags", inputs.changed_flags, "EA", ""),
    19: ("wrong kind", damage.wrong_kind, ALL, "E"),
    20: ("prefixes", damage.prefixes, "E", ""),
    21: ("missing part", inputs.missing_part, "MEVH", ""),
    22: ("malicious file", damage.malicious, ALL, "E"),
    23: ("malicious formula", inputs.malicious_formula, "S", ""),
    24: ("bad JSONL", inputs.bad_jsonl, "EP", ""),
    25: ("huge line", inputs.huge_line, "E", ""),
    26: ("layout", inputs.layout, "E", ""),
    27: ("data changed", inputs.data_changed, "EA", ""),
    28: ("tokenizer changed", inputs.tokenizer_changed, "EH", ""),
    29: ("two at once", crashes.two_at_once, ALL, "E"),
    30: ("finished again", crashes.finished_again, ALL, ""),
    31: ("workers die", crashes.workers_die, "H", ""),
    32: ("ranks", ranks.signalled_ranks, "E", "E"),
    33: ("one rank fails", ranks.one_rank_fails, "E", ""),
    34: ("elastic", ranks.elastic, "E", ""),
    35: ("other world", ranks.other_world, "EH", ""),
    36: ("rotation", crashes.rotation, "EH", ""),
    37: ("foreign files", damage.foreign_files, "EH", ""),
    38: ("path names", inputs.path_names, "HA", ""),
    39: ("pipes", surroundings.pipes, "E", ""),
    40: ("surroundings", surroundings.surroundings, "E", ""),
}
