using System;

namespace Safelight
{
    /// <summary>Options of a client. A null property means the default.</summary>
    public sealed class ClientOptions
    {
        /// <summary>Sent as a bearer token. Visible ASCII characters.</summary>
        public string ApiKey { get; set; }

        /// <summary>Whether to use TLS.</summary>
        public bool Tls { get; set; }

        /// <summary>The certificate authorities to trust, as PEM; null: those of the system. Only with TLS.</summary>
        public string CaPem { get; set; }

        /// <summary>The name in the server's certificate, if it is not the target's host. Only with TLS.</summary>
        public string ServerName { get; set; }

        /// <summary>The client's own certificate, as PEM, for a server that demands one. Only with TLS and a key.</summary>
        public string CertificatePem { get; set; }

        /// <summary>The private key of the client's own certificate, as PEM.</summary>
        public string KeyPem { get; set; }

        /// <summary>How long the client tries to resume a lost generation after its last event: 60 s.</summary>
        public TimeSpan? Patience { get; set; }

        /// <summary>How often a request is sent again if its refusal says after which time to retry: 3.</summary>
        public int? Retries { get; set; }

        /// <summary>The largest message that is received, in bytes: 4 MiB. A larger one is the error ResourceExhausted.</summary>
        public int? MaxMessageBytes { get; set; }

        internal OptionsHandle ToNative()
        {
            bool hasCertificate = CertificatePem != null || KeyPem != null;
            if (!Tls && (CaPem != null || ServerName != null || hasCertificate))
            {
                throw new ArgumentException("CaPem, ServerName, CertificatePem and KeyPem need Tls = true");
            }
            if (hasCertificate && (CertificatePem == null || KeyPem == null))
            {
                throw new ArgumentException("CertificatePem and KeyPem go together");
            }
            OptionsHandle options = Native.safelight_options_new();
            if (ApiKey != null) Native.safelight_options_set_api_key(options, Native.Utf8(ApiKey));
            if (Tls) Native.safelight_options_set_tls(options, Native.Utf8(CaPem), Native.Utf8(ServerName));
            if (hasCertificate)
            {
                Native.safelight_options_set_certificate(options, Native.Utf8(CertificatePem), Native.Utf8(KeyPem));
            }
            if (Patience is TimeSpan patience) Native.safelight_options_set_patience_s(options, patience.TotalSeconds);
            if (Retries is int retries) Native.safelight_options_set_retries(options, retries);
            if (MaxMessageBytes is int bytes) Native.safelight_options_set_max_message_bytes(options, bytes);
            return options;
        }
    }
}
