using System;
using System.Collections.Generic;

namespace Safelight
{
    /// <summary>gRPC's status codes.</summary>
    public enum StatusCode
    {
        Cancelled = 1,
        Unknown = 2,
        InvalidArgument = 3,
        DeadlineExceeded = 4,
        NotFound = 5,
        AlreadyExists = 6,
        PermissionDenied = 7,
        ResourceExhausted = 8,
        FailedPrecondition = 9,
        Aborted = 10,
        OutOfRange = 11,
        Unimplemented = 12,
        Internal = 13,
        Unavailable = 14,
        DataLoss = 15,
        Unauthenticated = 16
    }

    /// <summary>What to change in an invalid request.</summary>
    public sealed class Violation
    {
        internal Violation(string field, string description)
        {
            Field = field;
            Description = description;
        }

        /// <summary>The path of the field, such as "spec.num_inference_steps".</summary>
        public string Field { get; }

        /// <summary>A description for people.</summary>
        public string Description { get; }
    }

    /// <summary>A request or a generation failed: at the server, in the network, or in the library.</summary>
    public sealed class SafelightException : Exception
    {
        private SafelightException(string message) : base(message) { }

        public StatusCode Code { get; private set; }

        /// <summary>The code's name in gRPC, such as "INVALID_ARGUMENT".</summary>
        public string CodeName { get; private set; }

        /// <summary>A stable name for programs, such as "QUEUE_FULL"; "" where there is none.</summary>
        public string Reason { get; private set; }

        public IReadOnlyList<Violation> Violations { get; private set; }

        /// <summary>When to retry; null if the server named no time.</summary>
        public TimeSpan? RetryAfter { get; private set; }

        /// <summary>Converts an error of the library to an exception, and frees it.</summary>
        internal static SafelightException Take(ErrorHandle error)
        {
            using (error) return error.While(Read);
        }

        internal static SafelightException Read(IntPtr error)
        {
            var violations = new List<Violation>();
            for (int i = 0; i < Native.safelight_error_num_violations(error); ++i)
            {
                violations.Add(new Violation(
                    Native.Text(Native.safelight_error_violation_field(error, i)),
                    Native.Text(Native.safelight_error_violation_description(error, i))));
            }
            double retryAfter = Native.safelight_error_retry_after_s(error);
            return new SafelightException(Native.Text(Native.safelight_error_message(error)))
            {
                Code = (StatusCode)Native.safelight_error_code(error),
                CodeName = Native.Text(Native.safelight_error_code_name(error)),
                Reason = Native.Text(Native.safelight_error_reason(error)),
                Violations = violations,
                RetryAfter = retryAfter >= 0 ? TimeSpan.FromSeconds(retryAfter) : (TimeSpan?)null
            };
        }
    }
}
