"""x"""

from nested_core import backend

backend.prepare()
