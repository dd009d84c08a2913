from . import event_loop as event_loop
from .arguments import Signature as Signature
from .arguments import signature_of as signature_of
from .process_state import SETTINGS as SETTINGS
from .process_state import ModuleState as ModuleState
from .process_state import module_state as module_state
from .process_state import restore as restore
from .process_state import shared_settings as shared_settings
