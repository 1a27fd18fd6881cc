"""
Make one file of a checkpoint whose shards are in files of their own (see shards.py):

    python -m nanoblocks.training.join --ckpt=out/ckpt.pt --out=whole.pt
"""
import os

from configurator import configure, errors_as_messages

ckpt = 'out/ckpt.pt'    # a checkpoint of a run with --shard=True
out = 'whole.pt'        # the file to write, which holds all of it

if __name__ == '__main__':
    configure(globals())
    from nanoblocks.training import checkpoint, shards
    with errors_as_messages():
        if os.path.exists(out):
            raise ValueError(f'out={out} must not exist yet: choose another name with --out=FILE')
        checkpoint.save(out, shards.whole(checkpoint.load(ckpt)))
    print(f'wrote {out}')
