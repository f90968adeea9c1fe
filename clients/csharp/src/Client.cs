using System;
using System.Collections.Generic;
using System.Linq;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;
using System.Xml.Linq;

namespace Safelight
{
    /// <summary>A connection to a Safelight server. Several threads may use it.</summary>
    public sealed class Client : IDisposable
    {
        private readonly ClientHandle handle;

        /// <param name="target">"host:port". Several replicas are separated by commas; if one fails, the next one is
        /// asked. Nothing is connected before the first request.</param>
        /// <param name="options">null: the defaults.</param>
        /// <exception cref="DllNotFoundException">The system does not find libsafelight.</exception>
        /// <exception cref="NotSupportedException">libsafelight has an unsuitable version.</exception>
        public Client(string target, ClientOptions options = null)
        {
            if (target == null) throw new ArgumentNullException(nameof(target));
            CheckLibrary();
            using (OptionsHandle native = (options ?? new ClientOptions()).ToNative())
            {
                handle = Native.safelight_client_new(Native.Utf8(target), native, out ErrorHandle error);
                if (handle.IsInvalid) throw SafelightException.Take(error);
            }
        }

        /// <summary>Starts a generation and returns at once.</summary>
        /// <param name="timeout">Its deadline, over all connections; null: none.</param>
        public Generation Generate(GenerateRequest request, TimeSpan? timeout = null)
        {
            if (request == null) throw new ArgumentNullException(nameof(request));
            using (RequestHandle native = request.ToNative())
            {
                GenerationHandle started = Native.safelight_generate(handle, native, Seconds(timeout), out ErrorHandle error);
                if (started.IsInvalid) throw SafelightException.Take(error);
                return new Generation(started);
            }
        }

        /// <summary>Starts a generation of one picture with the model's defaults.</summary>
        public Generation Generate(string prompt, TimeSpan? timeout = null) =>
            Generate(new GenerateRequest(prompt), timeout);

        /// <summary>Requests pictures and returns the first, for programs that show no previews.</summary>
        /// <param name="cancellation">Closes the generation; the task is cancelled.</param>
        public async Task<Picture> PictureAsync(
            GenerateRequest request, TimeSpan? timeout = null, CancellationToken cancellation = default(CancellationToken))
        {
            using (Generation generation = Generate(request, timeout))
            {
                return await generation.PictureAsync(0, cancellation).ConfigureAwait(false);
            }
        }

        /// <summary>Watches an existing generation.</summary>
        /// <param name="previews">A request whose preview options are used; null: no previews.</param>
        public Generation Watch(string generation, GenerateRequest previews = null, TimeSpan? timeout = null)
        {
            if (generation == null) throw new ArgumentNullException(nameof(generation));
            using (RequestHandle native = previews == null ? new RequestHandle() : previews.ToNative())
            {
                GenerationHandle started = Native.safelight_watch(
                    handle, Native.Utf8(generation), native, Seconds(timeout), out ErrorHandle error);
                if (started.IsInvalid) throw SafelightException.Take(error);
                return new Generation(started);
            }
        }

        /// <summary>Lists the server's models. Waits for the answer, as do the next two methods.</summary>
        public IReadOnlyList<Model> Models()
        {
            string json = Take(Native.safelight_client_models(handle, out ErrorHandle error), error);
            return Json.Parse(json).Elements("models").Elements("item").Select(model => new Model(model)).ToList();
        }

        /// <summary>Returns the present state of "generations/ID".</summary>
        public GenerationInfo Get(string generation)
        {
            if (generation == null) throw new ArgumentNullException(nameof(generation));
            byte[] name = Native.Utf8(generation);
            return new GenerationInfo(Take(Native.safelight_client_get(handle, name, out ErrorHandle error), error));
        }

        /// <summary>Stops "generations/ID" and returns its final state, with the step that each output had reached.</summary>
        public GenerationInfo Cancel(string generation)
        {
            if (generation == null) throw new ArgumentNullException(nameof(generation));
            byte[] name = Native.Utf8(generation);
            return new GenerationInfo(Take(Native.safelight_client_cancel(handle, name, out ErrorHandle error), error));
        }

        /// <summary>Uploads an init image: the bytes of a PNG, JPEG or WebP file. Waits for the answer.</summary>
        /// <returns>Its name, for <see cref="GenerateRequest.InitImage"/>; the server keeps it for a while.</returns>
        public string UploadImage(byte[] data)
        {
            if (data == null) throw new ArgumentNullException(nameof(data));
            if (data.Length == 0) throw new ArgumentException("has no bytes", nameof(data));
            GCHandle pinned = GCHandle.Alloc(data, GCHandleType.Pinned);
            try
            {
                TextHandle name = Native.safelight_client_upload_image(
                    handle, pinned.AddrOfPinnedObject(), (UIntPtr)data.Length, out ErrorHandle error);
                return Take(name, error);
            }
            finally
            {
                pinned.Free();
            }
        }

        /// <summary>Frees the client. Its generations continue.</summary>
        public void Dispose() => handle.Dispose();

        internal static string Take(TextHandle text, ErrorHandle error)
        {
            if (text.IsInvalid) throw SafelightException.Take(error);
            using (text) return text.While(Native.Text);
        }

        private static void CheckLibrary()
        {
            uint found;
            try
            {
                found = Native.safelight_abi_version();
            }
            catch (DllNotFoundException missing)
            {
                throw new DllNotFoundException(
                    "libsafelight, or a library that it needs, was not found: build clients/cpp, and install it or name its "
                    + "folder in LD_LIBRARY_PATH (Linux) or PATH (Windows)", missing);
            }
            if (found >> 16 != Native.AbiVersion >> 16 || found < Native.AbiVersion)
            {
                throw new NotSupportedException(
                    $"libsafelight has the ABI {found:x8}; this client needs {Native.AbiVersion:x8} or a later minor version");
            }
        }

        private static double Seconds(TimeSpan? timeout)
        {
            if (timeout <= TimeSpan.Zero) throw new ArgumentOutOfRangeException(nameof(timeout), "more than 0, or null for none");
            return timeout?.TotalSeconds ?? 0;
        }
    }
}
