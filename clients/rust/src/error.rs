use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Why the server refused a call, why a generation failed, or that no server could be reached.
#[derive(Clone, Debug)]
pub struct Error(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    status: Status,
    reason: Option<String>,
    violations: BTreeMap<String, String>,
    retry_after: Option<Duration>,
}

impl Error {
    /// The gRPC status code.
    pub fn code(&self) -> Code {
        self.0.status.code()
    }

    /// A description for people.
    pub fn message(&self) -> &str {
        self.0.status.message()
    }

    /// A stable name for programs, such as "QUEUE_FULL"; `None` if the server sent none.
    pub fn reason(&self) -> Option<&str> {
        self.0.reason.as_deref()
    }

    /// What to change in an invalid request: a description by the path of each field.
    pub fn violations(&self) -> &BTreeMap<String, String> {
        &self.0.violations
    }

    /// The time after which the server asks to retry; `None` if it sent none.
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// The whole status, with all its details.
    pub fn status(&self) -> &Status {
        &self.0.status
    }

    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Status::new(code, message).into()
    }
}

impl From<Status> for Error {
    /// tonic reports a lost connection by several codes; here it is `Unavailable`, as in other languages. A message above
    /// the client's limit is `ResourceExhausted`, as in gRPC.
    fn from(status: Status) -> Self {
        let status = if is_lost(&status) {
            Status::unavailable(causes(&status))
        } else if status.code() == Code::OutOfRange && status.details().is_empty() {
            Status::resource_exhausted(status.message()) // tonic's own: the server's errors have details
        } else {
            status
        };
        let mut violations = BTreeMap::new();
        for violation in status
            .get_details_bad_request()
            .into_iter()
            .flat_map(|fault| fault.field_violations)
        {
            violations.insert(violation.field, violation.description);
        }
        Self(Box::new(Inner {
            reason: status.get_details_error_info().map(|info| info.reason),
            retry_after: status
                .get_details_retry_info()
                .and_then(|info| info.retry_delay),
            violations,
            status,
        }))
    }
}

/// Whether a status means a lost connection and does not come from the server. Errors that tonic finds in a connection
/// have a source. A stream that ended within a message or without a status has none, nor has a call that a stopping server
/// cancels; these have one of the codes below and no details, which every error of Safelight has.
fn is_lost(status: &Status) -> bool {
    let codes = [Code::Cancelled, Code::Unknown, Code::Internal];
    let broken = codes.contains(&status.code()) && status.details().is_empty();
    broken || std::error::Error::source(status).is_some()
}

/// The message of a status, with those of its causes.
fn causes(status: &Status) -> String {
    let mut said = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let next = error.to_string();
        if !said.contains(&next) {
            said = format!("{said}: {next}");
        }
        cause = error.source();
    }
    said
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "safelight: {:?}: {}", self.code(), self.message())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn errors_are_readable() {
        let mut details = ErrorDetails::with_error_info(
            "QUEUE_FULL",
            "safelight",
            std::collections::HashMap::new(),
        );
        details.set_retry_info(Some(Duration::from_secs(3)));
        details.add_bad_request_violation("spec.model", "name one that is there");
        let status =
            Status::with_error_details(Code::ResourceExhausted, "the queue is full", details);
        let error = Error::from(status);
        assert_eq!(error.code(), Code::ResourceExhausted);
        assert_eq!(error.reason(), Some("QUEUE_FULL"));
        assert_eq!(error.retry_after(), Some(Duration::from_secs(3)));
        assert_eq!(error.violations()["spec.model"], "name one that is there");
        assert_eq!(
            error.to_string(),
            "safelight: ResourceExhausted: the queue is full"
        );
    }

    #[test]
    fn what_the_server_did_not_say_is_a_lost_connection() {
        let reset = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        for lost in [
            Status::from_error(Box::new(reset)),
            Status::internal("Unexpected EOF decoding stream."),
            Status::cancelled("CANCELLED"),
        ] {
            let error = Error::from(lost);
            assert_eq!((error.code(), error.reason()), (Code::Unavailable, None));
        }
        let too_large = Error::from(Status::out_of_range("decoded message length too large"));
        assert_eq!(too_large.code(), Code::ResourceExhausted);
        let said = Status::resource_exhausted("Received message larger than max");
        assert_eq!(Error::from(said).code(), Code::ResourceExhausted);
    }
}
