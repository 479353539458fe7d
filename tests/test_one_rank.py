"""Stand-ins for collectives: what the benchmark's one rank is handed in place of what others would send."""

import torch
import torch.distributed as dist

from infir2 import one_rank


def test_every_result_is_filled():
    """Pins: memory that nobody wrote in a result that is larger than what went in, an input that lies in its output."""
    mine = torch.arange(6.0).view(2, 3)
    every = torch.full((8, 3), torch.nan)
    one_rank._all_gather(every, mine)
    assert torch.equal(every, mine.repeat(4, 1))
    within = torch.full((8, 3), torch.nan)
    within[2:4] = mine
    assert one_rank._all_gather(within, within[2:4], async_op=True).wait()
    assert torch.equal(within, every)

    part = torch.full((2, 3), torch.nan)
    one_rank._reduce_scatter(part, every)
    assert torch.equal(part, mine)
    received = torch.full((4, 2, 3), torch.nan)
    one_rank._all_to_all(received, every.view(4, 2, 3))
    assert torch.equal(received, every.view(4, 2, 3))

    came = torch.full((2, 3), torch.nan)
    operations = [one_rank._Operation(dist.isend, mine, 1), one_rank._Operation(dist.irecv, came, 1)]
    assert all(one.wait() for one in one_rank._batch_isend_irecv(operations))
    assert torch.equal(came, mine)
    objects = [None] * 3
    one_rank._all_gather_object(objects, "here")
    assert objects == ["here"] * 3
