"""``python -m inferos.config > docs/policy.schema.json``."""

import json
import sys

from inferos.config.json_schema import json_schema

sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
