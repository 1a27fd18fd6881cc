"""
Checkpoints of which each process writes its shards to a file of its own (PyTorch's Distributed Checkpoint).
All else is in the checkpoint's usual file, with the checksums of the others, and is written last: as long as
it is not there, neither is the checkpoint.

    ckpt.pt         as always, but for None in the place of sharded tensors, and `shards` beside them
    ckpt.120.shards the shards of step 120: __0_0.distcp of process 0, __1_0.distcp, ..., and .metadata

Any number of processes can read it, and join.py makes one file of it.
"""
import errno
import os
import pickle
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from nanoblocks.files import flush_file, flush_folder
from nanoblocks.formats import first_line
from nanoblocks.training import checkpoint
from nanoblocks.training.parallel import is_sharded

# ----------------------------------------------------------------------------------------------------------
# Writing


def write(folder: str, state: dict, group) -> dict:
    """
    Write the sharded tensors of `state` to a new folder, each process of the gloo `group` its own, and return
    what the checkpoint's usual file holds. Every process must call it. OSError in all of them if one fails.
    """
    rest, tensors, keys = split(state)
    files = Files()
    writer = dcp.FileSystemWriter(folder, sync_files=False)  # Files does that
    writer.fs = files
    try:
        with checkpoint.without_inner_checksums():
            dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        raise os_error_of(error) from None
    digests = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, files.digests, group=group)
    flush_folder(folder)
    digests = {name: digest for found in digests for name, digest in found.items()}
    return rest | {'shards': {'folder': os.path.basename(folder), 'files': digests, 'tensors': keys}}


def os_error_of(error):
    """The OSError that made one of the processes fail; any other error as it is."""
    found = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
    return OSError(found[0].errno, found[0].strerror) if found else error


def split(state):
    """
    (`state` with None in the place of sharded tensors, those tensors by a key, {path in state: key}). A path
    is keys and indices, with slashes between them; tied weights have two paths, and one key.
    """
    tensors, keys, known = {}, {}, {}

    def without(value, path):
        if isinstance(value, dict):
            return {name: without(inner, (*path, name)) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(without(inner, (*path, i)) for i, inner in enumerate(value))
        if not is_sharded(value):
            return value
        path = '/'.join(map(str, path))
        keys[path] = known.setdefault(id(value), path)
        tensors[keys[path]] = value
        return None
    return without(state, ()), tensors, keys


class Files(FileSystem):
    """Files whose bytes are hashed while they are written, and flushed to the disk: digests, by name."""

    def __init__(self):
        self.digests = {}

    @contextmanager
    def create_stream(self, path, mode):
        with open(path, mode) as f:
            if mode != 'wb':
                yield f
                return
            stream = Stream(f)
            try:
                yield stream
                stream.close()
            except RuntimeError as error:  # how torch reports a failed write
                raise stream.error or OSError(errno.EIO, first_line(error)) from None
            # .metadata gets its name when it is complete
            self.digests[os.path.basename(path).removesuffix('.tmp')] = stream.checksum.hexdigest()


class Stream(checkpoint.HashedFile):
    """A file that hashes the bytes written to it, with no seal in it."""

    def tell(self):
        return self.file.tell()

    def close(self):
        if not self.file.closed:
            flush_file(self.file)
            self.file.close()


# ----------------------------------------------------------------------------------------------------------
# Reading


def attach(state: dict, path: str) -> None:
    """
    Put what was split off from the checkpoint at `path` back into `state`: weights in full, and everything
    else as a `Stored`, to be read where it is needed. Damaged if a file is missing or has another checksum.
    """
    record = state.pop('shards')
    folder = os.path.join(os.path.dirname(path), record['folder'])
    for name, digest in record['files'].items():
        file = os.path.join(folder, name)
        if not os.path.isfile(file):
            raise checkpoint.Damaged(f'{path} lacks {file}, a part of it: put its folder beside it again, or '
                                     'use another checkpoint')
        if digest_of(file) != digest:
            raise checkpoint.Damaged(f'{file} is damaged, a part of {path}: use another checkpoint, or train '
                                     'again')
    reader = Reader(folder)
    for place, key in record['tensors'].items():
        *outer, last = place.split('/')
        inside = state
        for name in outer:
            inside = inside[int(name) if isinstance(inside, list) else name]
        inside[last] = Stored(reader, key)
    weights = {name: value for name, value in state['model'].items() if isinstance(value, Stored)}
    full = {value.key: value.empty() for value in weights.values()}
    reader.fill(full)
    state['model'] |= {name: full[value.key] for name, value in weights.items()}


def digest_of(file):
    checksum = checkpoint.Checksum()
    with open(file, 'rb') as f:
        while piece := f.read(1 << 22):
            checksum.update(piece)
    return checksum.hexdigest()


class Stored:
    """A tensor of a sharded checkpoint that has not been read yet."""

    def __init__(self, reader, key):
        self.reader, self.key = reader, key

    def empty(self):
        found = self.reader.read_metadata().state_dict_metadata[self.key]
        return torch.empty(found.size, dtype=found.properties.dtype)

    def read(self, like=None):
        """The tensor in full, or cut as the sharded tensor `like` is: then no more than that is read."""
        tensor = torch.empty_like(like.detach()) if is_sharded(like) else self.empty()
        self.reader.fill({self.key: tensor})
        return tensor


class Reader(dcp.FileSystemReader):
    """Reads tensors of a folder, and runs no code that may be in it."""
    metadata = None

    def read_metadata(self, *args, **kwargs):
        if self.metadata is None:
            with open(os.path.join(self.path, '.metadata'), 'rb') as f:
                self.metadata = Descriptions(f).load()
        return self.metadata

    def fill(self, tensors):
        """Read the tensors of these keys in place, without asking other processes."""
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that no process is asked
            dcp.load(tensors, storage_reader=self, no_dist=True)


class Descriptions(pickle.Unpickler):
    """Reads the pickle .metadata, of nothing but the classes that describe tensors."""
    modules = ('torch.distributed.checkpoint.metadata', 'torch.distributed.checkpoint.filesystem', 'pathlib')

    def find_class(self, module, name):
        found = super().find_class(module, name)
        known = isinstance(found, type) and found.__module__.partition('._')[0] == module in self.modules
        torch_own = module == 'torch' and (found is torch.Size or isinstance(found, torch.dtype))
        if not (known or torch_own or (module, name) == ('torch.serialization', '_get_layout')):
            raise pickle.UnpicklingError(f'{module}.{name} describes no tensor')
        return found



def whole(value):
    """`value` with every Stored tensor in it read."""
    if isinstance(value, dict):
        return {name: whole(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(inner) for inner in value)
    return value.read() if isinstance(value, Stored) else value
