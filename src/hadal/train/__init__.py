"""Training: the report's recipe at a small scale.

Tokenizer, demonstrations from real boxes, packing, Muon with AdamW, schedules, quantisation-aware training,
and checkpoints from which a run goes on bit for bit.
"""
