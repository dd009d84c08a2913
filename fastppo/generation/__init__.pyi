from .parts import Parts as Parts
from .parts import part_schema as part_schema
from .rows import columns_left_out as columns_left_out
from .rows import scored_rows as scored_rows
