from .tool_calls import Call as Call
from .tool_calls import ToolCalls as ToolCalls
from .tool_calls import ToolForm as ToolForm
from .tool_calls import call_texts as call_texts
from .tool_calls import parse_calls as parse_calls
from .tool_calls import tool_form as tool_form
