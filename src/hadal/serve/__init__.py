"""HTTP in the shapes that agents already speak, over our engine or another server.

Start with `build_app` (app.py); `Front.run` (turn.py) is what every chat route does, `Backend`
(backend.py) the seam behind it.
"""

from hadal.serve.app import ServerConfig, build_app
from hadal.serve.backend import Backend
from hadal.serve.engine_backend import EngineBackend
from hadal.serve.scripted_backend import ScriptedBackend
from hadal.serve.turn import Front

__all__ = [
    "Backend",
    "EngineBackend",
    "Front",
    "ScriptedBackend",
    "ServerConfig",
    "build_app",
]
