"""Prints what cloud-init makes of a document of user-data: its users, its host keys, and the heads of its parts.

Where cloud-init itself can be imported (PYTHONPATH), its own code does it; else the few rules of its release 22.4 that matter here:
`handlers/cloud_config.py`, `mergers/m_*.py`, `distros/ug_util.py`.
"""

import email
import json
import sys

import yaml

OWN_USER = {"name": "debian", "sudo": ["ALL=(ALL) NOPASSWD:ALL"], "shell": "/bin/bash", "groups": ["adm"]}

try:
    from cloudinit import mergers
    from cloudinit.distros import ug_util
    from cloudinit.handlers.cloud_config import DEF_MERGERS

    class Distro:
        def get_default_user(self):
            return dict(OWN_USER)

    def join(config, part):
        how = mergers.dict_extract_mergers(part) or DEF_MERGERS
        return mergers.construct(how).merge(config, part)

    def users_of(config):
        return ug_util.normalize_users_groups(config, Distro())[0]

except ImportError:

    def options(part):
        how = part.pop("merge_how", None) or part.pop("merge_type", None)
        if how is None:
            return {"list": [], "dict": ["replace"], "str": []}
        if isinstance(how, str):
            pairs = [one.strip().rstrip(")").split("(") for one in how.split("+")]
            return {name: [option.strip() for option in text.split(",")] for name, text in pairs}
        return {one["name"]: one["settings"] for one in how}

    def merge(how, old, new):
        if isinstance(old, dict) and isinstance(new, dict):
            joined = dict(old)
            for key, value in new.items():
                if key not in joined or "replace" in how["dict"]:
                    joined[key] = value
                elif isinstance(value, dict) or (isinstance(value, list) and "recurse_list" in how["dict"]):
                    joined[key] = merge(how, joined[key], value)
            return joined
        if isinstance(old, list):
            new = new if isinstance(new, list) else [new]
            if "prepend" in how["list"]:
                return new + old
            return old + new if "append" in how["list"] else new + old[len(new):]
        return new if isinstance(old, str) else old

    def join(config, part):
        return merge(options(part), config, part)

    def merged(configs):
        joined = {}
        for config in configs:
            joined.update({key: value for key, value in (config or {}).items() if key not in joined})
        return joined

    def names(text):
        return [name for name in text.strip().split(",") if name]

    def users_of(config):
        old = config.get("user") or {}
        old = {"name": old} if isinstance(old, str) else old
        own = merged([old, OWN_USER])
        entries = config.get("users", [])
        entries = [] if entries is None else entries
        if isinstance(entries, dict):
            entries = [dict(entry, name=name) if isinstance(entry, dict) else name for name, entry in entries.items() if entry is not False]
        elif isinstance(entries, str):
            entries = sorted(names(entries))
        entries = list(entries) + ([{"name": "default"}] if old else [])
        users = {}
        for entry in entries:
            if isinstance(entry, dict):
                entry = dict(entry)
                name = entry.pop("name", "default")
                users[name] = merged([users.get(name), entry])
            elif isinstance(entry, (list, str)):
                for name in names(entry) if isinstance(entry, str) else entry:
                    users.setdefault(name, {})
            else:
                raise TypeError(entry)
        if "default" in users:
            entry, name = users.pop("default"), own.pop("name")
            users[name] = merged([own, entry, users.pop(name, {})])
        return users


message = email.message_from_string(sys.stdin.buffer.read().decode())
parts = [part.get_payload(decode=True).decode() for part in message.walk() if not part.is_multipart()]
config = {}
for text in parts:
    if text.lstrip().lower().startswith("#cloud-config") and not text.lstrip().startswith("#cloud-config-"):
        part = yaml.safe_load(text)
        config = config if part is None else join(config, part)
    if text.startswith("#cloud-config-archive"):
        for entry in yaml.safe_load(text):
            config = join(config, yaml.safe_load(entry if isinstance(entry, str) else entry["content"]))
users = {name: {key: value for key, value in user.items() if key != "default"} for name, user in users_of(config).items()}
heads = [part.splitlines()[0] for part in parts]
json.dump({"users": users, "order": list(users), "config": config, "heads": heads, "first": parts[0]}, sys.stdout)
