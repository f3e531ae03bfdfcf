"""JSON and csv files that people bring along: whatever is wrong with one becomes a ValueError that names it."""
import csv
import json


def read_json(path, name=None):
    """What a JSON file holds. name: what the errors call it. Refused too: names that occur twice in an object, of which
    json would keep the last."""
    name = name or str(path)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=unique)
    except KeyError as error:
        raise ValueError(f"{name} has two entries for {error.args[0]!r}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON, was it cut off? ({error})") from error


def unique(pairs):
    """dict of a JSON object; KeyError if a name occurs twice."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise KeyError(name)
        found[name] = value
    return found


def read_csv(path, name=None):
    """Yield (line number, fields) of a csv file without its empty lines, blanks around the fields removed."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            for line, fields in enumerate(csv.reader(file), 1):
                fields = [field.strip() for field in fields]
                if any(fields):
                    yield line, fields
    except csv.Error as error:
        raise ValueError(f"{name or path} is no csv file ({error})") from error
