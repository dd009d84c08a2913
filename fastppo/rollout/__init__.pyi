from .inprocess import bucket as bucket
from .inprocess import named_stop_ids as named_stop_ids
from .inprocess import sample as sample
from .inprocess import stop_ids as stop_ids
