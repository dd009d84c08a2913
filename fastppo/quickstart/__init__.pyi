from .judge import favourable as favourable
