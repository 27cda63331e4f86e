"""A fit on a Parquet file, a row group at a time (needs pyarrow).

::

    python tutorials/parquet.py

"""

import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyro
import pyro.distributions as dist
import torch

import pyro_vem as vem


class RowGroups:
    """The row groups of a Parquet file, in a new order each epoch, as mappings of columns."""

    def __init__(self, path):
        self.file, self.epoch = pq.ParquetFile(path), 0

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(self.file.num_row_groups)
        self.epoch += 1
        for number in order:
            group = self.file.read_row_group(int(number))
            yield {name: torch.from_numpy(group[name].to_numpy().copy()) for name in group.column_names}


def regression(x, y):
    """A line through many rows."""
    sd = pyro.param("sd", torch.tensor(1.0), constraint=dist.constraints.positive)
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b * x, sd), obs=y)


def main(num_rows=1_000_000):
    """Write a file, fit it, and print what was found."""
    random = np.random.default_rng(0)
    x = random.standard_normal(num_rows)
    table = pa.table({"x": x, "y": 0.5 * x + 0.3 * random.standard_normal(num_rows)})
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        pq.write_table(table, file.name, row_group_size=10_000)
        fit = vem.fit_vem(regression, RowGroups(file.name), progress=False)
    loc, scale = (float(fit.guide_params[f"guide.{name}.b"]) for name in ("loc", "scale"))
    print(f"{fit.status.name}: sd {float(fit.params['sd']):.4f}, b {loc:.4f} +- {scale:.1e}")


if __name__ == "__main__":
    main()
