"""The contract that every mechanism signs, and the reference vectors that hold it to a paper.

    attlas.check("differential-transformer")     raises ContractError, or gives the results
    attlas.check(MyAttention)                     the same suite on an object of your own
"""

from attlas.contract.result import ContractError, Result
from attlas.contract.run import check

__all__ = ["ContractError", "Result", "check"]
