"""`python -m deploy.verify`: does what is deployed say what is declared, and do the declarations agree?

Declared: Terraform's configuration, a CloudFormation template, the chart's values. Deployed: what the services of AWS
and the cluster answer. Nothing is changed. Neighbours: `drift` (one difference, and how values are compared),
`terraform`, `cloudformation`, `chart`, `cluster`, `agreement` (Terraform and CloudFormation with each other), each from
its inputs to drifts.
"""
