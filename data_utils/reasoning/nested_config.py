"""Read the nested configuration files of older HRM trainers as flat flags of train_hrm.py."""

SECTIONS = "model encoder decoder hrm bridge optim train loss".split()
RENAMED = {
    "optim.lr": "learning_rate",
    "train.seq_len": "max_seq_len",
    "train.tgt_len": "max_seq_len",
    "encoder.n_layers": "encoder_layers",
    "decoder.n_layers": "decoder_layers",
    "hrm.h_layers": "core_layers",
    "hrm.l_layers": "core_layers",
    "hrm.approx_grad": "grad",
    "hrm.use_halting": "halting",
}
# A state slot per prompt token, supervision by segments and the tokenizer's own size replaced these.
NOT_NEEDED = [f"hrm.{name}" for name in "h_len l_len out_dim halting_target deep_supervision ds_weight".split()]


def flatten(bundle):
    """Return {flag: value} of a nested bundle: keys renamed, obsolete ones dropped and printed.

    Raises ValueError if two keys set the same flag to different values.
    """
    flags = {}
    dropped = []
    for section, values in bundle.items():
        nested = section in SECTIONS and isinstance(values, dict)
        for key, value in values.items() if nested else [(section, values)]:
            path = f"{section}.{key}" if nested else key
            if path in NOT_NEEDED or section == "bridge" or key == "vocab_size":
                dropped.append(path)
                continue
            pairs = {RENAMED.get(path, key): value}
            if path == "optim.betas":
                pairs = dict(zip(("beta1", "beta2"), value, strict=True))
            for flag, setting in pairs.items():
                if flags.setdefault(flag, setting) != setting:
                    raise ValueError(f"{path} {setting} and {flag} {flags[flag]} mean the same flag --{flag}")
    if dropped:
        print(f"no longer needed: {', '.join(dropped)}")
    return flags
