"""A table in DynamoDB: writes in batches, conditional writes and queries, through boto3.

boto3 is the extra `aws` and is imported when a table is opened. It takes region, credentials and endpoint
(`AWS_ENDPOINT_URL_DYNAMODB`) from where it takes them in every program. All calls block; call them in a thread.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

PARTITION = "pk"
"""Attribute with the partition key, a string."""
SORT = "sk"
"""Attribute with the sort key, a string."""
BATCH_ITEMS = 25
"""Items that one BatchWriteItem takes."""
ATTEMPTS = 8
"""Attempts of botocore at one call. It waits longer after each, and 20 s at most."""
STALLED_ROUNDS = 10
"""Batches in a row of which DynamoDB wrote nothing, after which writing fails."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 5.0
TIMEOUT_S = 10.0

Item = Mapping[str, Mapping[str, Any]]
"""An item as DynamoDB's API has it: each value with its type, such as {"S": "text"}."""


class TableError(Exception):
    """The table cannot be used; the message says why."""


class DynamoTable:
    """A table with the keys `PARTITION` and `SORT`.

    Args:
        name: of the table, or its ARN.
        timeout_s: for connecting, and for each answer.
        sleep: waits that many seconds before what DynamoDB left out of a batch is sent again.

    Raises:
        TableError: boto3 is not installed, or it finds no region.
    """

    def __init__(self, name: str, timeout_s: float = TIMEOUT_S, sleep: Callable[[float], None] = time.sleep) -> None:
        try:
            import boto3  # here, since the extra may be missing
            from botocore.config import Config
        except ModuleNotFoundError as error:
            raise TableError(
                f"{error.name} not installed: in a clone of Safelight, pip install -e clients/python -e '.[aws]'"
            ) from error
        self._name = name
        self._sleep = sleep
        # "standard" retries throttling and lost connections, with growing random waits. Every write may be repeated.
        retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
        options = Config(retries=retries, connect_timeout=timeout_s, read_timeout=timeout_s)
        with _translated():
            self._client = boto3.client("dynamodb", config=options)

    def get(self, partition: str, sort: str) -> Item | None:
        """Returns an item as it is now, or None."""
        key = {PARTITION: {"S": partition}, SORT: {"S": sort}}
        with _translated():
            found = self._client.get_item(TableName=self._name, Key=key, ConsistentRead=True)
        item: Item | None = found.get("Item")
        return item

    def replace(self, item: Item, attribute: str, expected: str | None) -> bool:
        """Writes an item if `attribute` of the stored one is still the expected text, or absent if that is None.

        Returns False, and writes nothing, if it is another.
        """
        names = {"#attribute": attribute}
        condition: dict[str, Any] = {"ConditionExpression": "attribute_not_exists(#attribute)"}
        if expected is not None:
            values = {":expected": {"S": expected}}
            condition = {"ConditionExpression": "#attribute = :expected", "ExpressionAttributeValues": values}
        with _translated():
            try:
                self._client.put_item(TableName=self._name, Item=item, ExpressionAttributeNames=names, **condition)
            except self._client.exceptions.ConditionalCheckFailedException:
                return False
        return True

    def write(self, items: Sequence[Item]) -> None:
        """Writes items in place of those with the same keys. No two items may have the same keys.

        DynamoDB may write a part of a batch only. The other part is sent again, after a random wait that doubles until
        something is written.

        Raises:
            TableError: DynamoDB wrote nothing of `STALLED_ROUNDS` batches in a row. Some items may be written.
        """
        waiting = list(items)
        stalled = 0
        while waiting:
            batch, rest = waiting[:BATCH_ITEMS], waiting[BATCH_ITEMS:]
            requests = [{"PutRequest": {"Item": item}} for item in batch]
            with _translated():
                answer = self._client.batch_write_item(RequestItems={self._name: requests})
            # By any name: the answer may have the table's where the request had its ARN.
            left = [request["PutRequest"]["Item"] for each in answer["UnprocessedItems"].values() for request in each]
            waiting = left + rest
            if not left:
                stalled = 0
                continue
            stalled = stalled + 1 if len(left) == len(batch) else 0
            if stalled == STALLED_ROUNDS:
                raise TableError(f"DynamoDB wrote nothing of {stalled} batches in a row: the table is throttled")
            self._sleep(random.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**stalled)))

    def query(self, partition: str, first: str, last: str) -> Iterator[Item]:
        """Yields the items of a partition from one sort key to another, both included, in the order of these keys."""
        asked = {
            "TableName": self._name,
            "ConsistentRead": True,
            "KeyConditionExpression": f"{PARTITION} = :partition AND {SORT} BETWEEN :first AND :last",
            "ExpressionAttributeValues": {
                ":partition": {"S": partition},
                ":first": {"S": first},
                ":last": {"S": last},
            },
        }
        while True:
            with _translated():
                page = self._client.query(**asked)
            yield from page["Items"]
            if "LastEvaluatedKey" not in page:
                return
            asked["ExclusiveStartKey"] = page["LastEvaluatedKey"]

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()


@contextmanager
def _translated() -> Iterator[None]:
    """Converts the errors of boto3 to `TableError`."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") == "ResourceNotFoundException":
            text = "no such table in this account and region (deploy/README.md says how to make one)"
            raise TableError(text) from error
        raise TableError(str(error)) from error
    except BotoCoreError as error:
        raise TableError(str(error)) from error
