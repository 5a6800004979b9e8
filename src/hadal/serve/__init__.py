"""HTTP in the shapes that agents already speak, over our engine or another server.

Start with `build_app` (app.py); `Front.run` (turn.py) is what every chat route does, `Backend`
(`hadal.backends`) the seam behind it.
"""

from hadal.backends.backend import Backend
from hadal.backends.engine_backend import EngineBackend
from hadal.backends.scripted_backend import ScriptedBackend
from hadal.serve.app import ServerConfig, build_app
from hadal.serve.turn import Front

__all__ = [
    "Backend",
    "EngineBackend",
    "Front",
    "ScriptedBackend",
    "ServerConfig",
    "build_app",
]
