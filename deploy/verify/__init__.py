"""`python -m deploy.verify` compares what is deployed with what is declared, and the declarations with each other.

Declarations are Terraform's configuration, a CloudFormation template and the chart's values. What is deployed is read
from the services of AWS and from the cluster. Nothing is changed. `drift` defines one difference and compares values.
`terraform`, `cloudformation`, `chart`, `cluster` and `agreement` (Terraform with CloudFormation) find the differences
of their kind.
"""
